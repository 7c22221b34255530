"""Our own CPU kernels: right at every shape that they accept, refused where they do not fit, never
needed."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import EngineError, load_engine
from common import native as targets
from tests import helpers
from torch_engine import native, products
from torch_engine.layers.norm import rms_norm
from torch_engine.pool import ACTIVATIONS
from torch_engine.products import linears, pack_native

DTYPES = [torch.bfloat16, torch.float32]


def kernels(dtype: torch.dtype) -> native.Kernels:
    found = native.load(dtype)
    if found is None:
        pytest.skip(f"no kernels for {dtype} here: see native.load for what they need")
    return found


def noise(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = (
        {"atol": 0.02, "rtol": 0.01} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    )
    torch.testing.assert_close(found.double(), exact.double(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(64, 64), (1, 2), (8, 1024), (37, 50), (100, 34), (129, 200), (320, 96)]
)
def test_linear_is_right_for_any_shape_and_number_of_rows(
    dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    found = kernels(dtype)
    weight = (noise(0, outputs, inputs) * inputs**-0.5).to(dtype)
    packed = products.pack_native(weight)
    if (
        packed.place is None
    ):  # where oneDNN packs, it does some shapes in other ways, and then multiplies them too
        assert not found.own_layout
        assert packed.kernels is None
    else:
        for rows in (*range(1, 15), 20):
            x = noise(rows, rows, inputs).to(dtype)
            close(
                native.linear(found, x, packed.place, outputs),
                x.double() @ weight.double().T,
                dtype,
            )
    x = noise(1, 5, inputs).to(dtype)
    close(products.linear(x, packed), x.double() @ weight.double().T, dtype)


def test_the_shapes_that_matter_are_taken() -> None:
    for dtype in DTYPES:
        kernels(dtype)
        for outputs, inputs in ((64, 64), (384, 128), (1536, 1024), (8, 64), (500, 64)):
            assert products.pack_native(noise(0, outputs, inputs).to(dtype)).place is not None


@pytest.mark.parametrize("inputs", [1, 33, 129, 257])
def test_odd_inputs(inputs: int) -> None:
    """Weights that we pack have a zero for the other half of the last pair; oneDNN's are left to
    it."""
    found = kernels(torch.bfloat16)
    weight, x = (noise(0, 64, inputs) * inputs**-0.5).bfloat16(), noise(1, 7, inputs).bfloat16()
    packed = products.pack_native(weight)
    assert found.own_layout or packed.place is None
    close(products.linear(x, packed), x.double() @ weight.double().T, torch.bfloat16)
    # What follows a row in memory is no number: it must not be multiplied with the padding.
    own = native.pack(weight)
    x = torch.cat([x, torch.full_like(x, torch.nan)])
    out = native.linear(found, x, native.place_of(own), 64)[:7]
    close(out, x[:7].double() @ weight.double().T, torch.bfloat16)


def onednn_packs(weight: torch.Tensor) -> torch.Tensor | None:
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
    ):  # no such type on this processor, or no oneDNN
        return None
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_packed_here_as_onednn_does_it(dtype: torch.dtype) -> None:
    """Where oneDNN packs in blocks of 64 outputs, and bfloat16 in pairs, what we pack is the
    same."""
    lanes = 2 if dtype == torch.bfloat16 else 1
    for outputs, inputs in ((64, 64), (1, 2), (384, 128), (100, 34), (63, 8), (65, 5)):
        weight = noise(0, outputs, inputs).to(dtype)
        own = native.pack(weight)
        by_hand = torch.zeros_like(own)
        for n in range(outputs):
            for k in range(inputs):
                by_hand[n // 64, k // lanes, n % 64, k % lanes] = weight[n, k]
        assert torch.equal(own, by_hand)
        packed = onednn_packs(weight)
        if packed is not None and (place := native.locate(weight, packed)) is not None:
            raw = (ctypes.c_char * own.nbytes).from_address(place.pointer)
            if place.stride == inputs:
                assert bytes(raw) == own.view(torch.uint8).numpy().tobytes()


def test_another_layout_is_noticed() -> None:
    found = kernels(torch.float32)
    weight, other = noise(0, 128, 64), noise(1, 128, 64)
    packed = onednn_packs(weight)
    if packed is None:
        assert found.own_layout
        return
    assert (native.locate(weight, packed) is None) == found.own_layout
    assert native.locate(other, packed) is None
    assert native.locate(weight.T.contiguous(), packed) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (5, 1), (13, 3)])
def test_a_whole_layer_of_experts(
    dtype: torch.dtype, activation: str, tokens: int, top_k: int
) -> None:
    found = kernels(dtype)
    hidden, inter, num_experts = 40, 64, 5
    gate_up = [(noise(i, 2 * inter, hidden) * 0.2).to(dtype) for i in range(num_experts)]
    down = [(noise(9 + i, hidden, inter) * 0.2).to(dtype) for i in range(num_experts)]
    x = noise(3, tokens, hidden).to(dtype)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
    gates = torch.from_numpy(rng.random((tokens, top_k), dtype=np.float32))
    packed = [
        (products.pack_native(a), products.pack_native(b))
        for a, b in zip(gate_up, down, strict=True)
    ]
    order = np.argsort(ids.reshape(-1), kind="stable")
    hit, starts = np.unique(ids.reshape(-1)[order], return_index=True)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    out = native.experts(
        found,
        x,
        [p for p in (packed[i][0].place for i in hit) if p],
        [p for p in (packed[i][1].place for i in hit) if p],
        inter,
        np.append(starts, len(order)).astype(np.int64),
        order // top_k,
        places,
        gates,
        activation,
    )
    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for choice in range(top_k):
            e = ids[t, choice]
            gate, up = (x[t].double() @ gate_up[e].double().T).chunk(2)
            exact[t] += gates[t, choice].double() * (
                (ACTIVATIONS[activation](gate) * up) @ down[e].double().T
            )
    close(out, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_equals_the_plain_one(dtype: torch.dtype) -> None:
    found = kernels(dtype)
    x, weights = noise(0, 7, 100).to(dtype), [(noise(i, 100) + 2).to(dtype) for i in (1, 2)]
    starts, eps = np.array([0, 3, 7], dtype=np.int64), np.array([1e-5, 0.3], dtype=np.float32)
    out = native.rms_norms(found, x, starts, weights, eps)
    close(out[:3], rms_norm(x[:3], weights[0], 1e-5), dtype)
    close(out[3:], rms_norm(x[3:], weights[1], 0.3), dtype)
    assert torch.equal(native.rms_norms(found, x * 0, starts, weights, eps), x * 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1, 1), (3, 8, 1), (2, 0, 13)])
def test_several_runs_of_rows_in_one_call(
    dtype: torch.dtype, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels(dtype)
    starts = np.cumsum([0, *rows]).astype(np.int64)
    x, weights = (
        noise(0, sum(rows), 70).to(dtype),
        [noise(1 + i, 130, 70).to(dtype) for i in range(len(rows))],
    )
    packed = [pack_native(w) for w in weights]
    calls: list[int] = []
    own = native.linears
    monkeypatch.setattr(native, "linears", lambda *a: (calls.append(1), own(*a))[1])
    exact = torch.cat(
        [
            x[a:b].double() @ w.double().T
            for a, b, w in zip(starts, starts[1:], weights, strict=False)
        ]
    )
    close(linears(x, starts, packed), exact, dtype)
    assert len(calls) == 1
    # What the kernels do not take in one call: too many rows, plain weights among packed ones.
    few = (
        [] if found.own_layout else [replace(p, kernels=replace(found, max_rows=1)) for p in packed]
    )
    mixed = [*packed[:-1], weights[-1]]
    for other in filter(None, (few, mixed, weights)):
        close(linears(x, starts, other), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 4, 40, 100])
@pytest.mark.parametrize(
    ("groups", "per_group", "size"),
    [(2, 2, 8), (1, 5, 4), (4, 1, 64), (2, 4, 64), (1, 9, 80), (1, 4, 128)],
)
def test_decode_attention(
    dtype: torch.dtype, window: int | None, groups: int, per_group: int, size: int
) -> None:
    found = kernels(dtype)
    lengths = np.array([1, 9, 70], dtype=np.int64)
    block, width = 4, groups * size + 3  # an arena that is wider than this tenant's keys
    keys, values = noise(0, 100, width).to(dtype), noise(1, 100, width).to(dtype)
    numbers = np.random.default_rng(0).permutation(25)  # blocks in any order
    tables = [numbers[:1].copy(), numbers[1:4].copy(), numbers[4:22].copy()]
    fused = noise(2, 3, groups * per_group + 2, size).to(dtype)
    q = fused[:, : groups * per_group]  # rows of q lie apart, as they do beside rotated keys
    out = native.decode_attention(
        found, q, keys, values, groups, tables, block, lengths, window, 0.3
    )
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        positions = np.arange(first, length)
        places = torch.from_numpy(tables[row][positions // block] * block + positions % block)
        k, v = (
            t[places, : groups * size]
            .view(-1, groups, size)
            .transpose(0, 1)
            .double()
            .repeat_interleave(per_group, 0)
            for t in (keys, values)
        )
        one = q[row].double()[:, None]
        exact = F.scaled_dot_product_attention(one, k, v, scale=0.3)[:, 0].reshape(-1)
        close(out[row], exact, dtype)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty cache of compiled kernels, and nothing loaded yet."""
    native.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    native.load.cache_clear()


@pytest.mark.parametrize("lack", ["compiler", "broken compiler", "AVX2", "x86", "leave"])
def test_without_kernels_onednn_does_all_products(
    lack: str, fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if lack == "compiler":
        fresh.setenv("PATH", str(tmp_path))
        fresh.delenv("CC", raising=False)
    elif lack == "broken compiler":
        fresh.setenv("CC", "false")
    elif lack == "AVX2":
        fresh.setattr(targets, "cpu_flags", lambda: frozenset({"avx"}))
    elif lack == "x86":
        fresh.setattr(targets.platform, "machine", lambda: "aarch64")
    else:
        fresh.setenv(targets.SWITCH, "0")
    with caplog.at_level(logging.INFO):
        assert native.load(torch.float32) is None
    assert "own CPU kernels are not used" in caplog.text
    model = helpers.random_mixtral(0)
    store = helpers.build_round_robin(
        tmp_path / "store", {"only": helpers.save(model, tmp_path / "only")}
    )
    rows = helpers.prompts(0, [12])
    with load_engine(store) as engine:
        assert engine.stats()["products"] in ("oneDNN", "torch")
        helpers.assert_close(engine.logits("only", rows), helpers.hf_logits(model, rows))
        answer = engine.generate("only", rows[0])
        assert list(answer.token_ids) == helpers.hf_greedy(
            model, rows[0], len(answer.token_ids), eos=2
        )


@pytest.mark.parametrize("value", ["", "yes", "01"])
def test_a_malformed_switch_is_an_error(fresh: pytest.MonkeyPatch, value: str) -> None:
    fresh.setenv(targets.SWITCH, value)
    with pytest.raises(EngineError, match=f"MOETEL_NATIVE='{value}'; use 1"):
        native.load(torch.float32)


def no_layout(*_: Any) -> Any:
    raise RuntimeError("no reorder of this type")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["AVX2", "AVX-512", "AVX-512 bf16"])
def test_where_onednn_packs_nothing(fresh: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    """Kernels for every processor up to this one pack by themselves and multiply any number of
    rows."""
    lack = {"AVX2": {"avx512f", "avx512_bf16"}, "AVX-512": {"avx512_bf16"}}.get(target, set())
    flags = native.cpu_flags() - lack - {"amx_bf16"}
    fresh.setattr(targets, "cpu_flags", lambda: flags)
    fresh.setattr(native, "cpu_flags", lambda: flags)
    fresh.setattr(native, "_shares_layout", lambda dtype: False)
    fresh.setattr(torch.ops.mkldnn, "_reorder_linear_weight", no_layout)
    if (found := native.load(torch.bfloat16)) is None or found.target != target:
        pytest.skip(f"this machine compiles no kernels for {target}")
    for dtype in DTYPES:
        for outputs, inputs in ((64, 64), (1, 2), (129, 200), (320, 96), (70, 517)):
            weight = (noise(0, outputs, inputs) * inputs**-0.5).to(dtype)
            packed = pack_native(weight)
            assert packed.place is not None and packed.nbytes == dtype.itemsize * outputs * inputs
            for rows in (1, 2, 3, 4, 5, 6, 7, 95, 97, 200):
                x = noise(rows, rows, inputs).to(dtype)
                close(products.linear(x, packed), x.double() @ weight.double().T, dtype)
    path = helpers.save(
        helpers.random_mixtral(0, hidden_size=32, intermediate_size=64).bfloat16(),
        tmp_path / "only",
    )
    store = helpers.build_round_robin(tmp_path / "store", {"only": path})
    with load_engine(store) as engine:
        assert engine.stats()["products"] == f"own kernels ({target})"
        for row in helpers.prompts(0, [150, 12]):
            rounded, exact = (
                helpers.hf_logits(helpers.load(path, *kind), [row])
                for kind in ((torch.bfloat16,), ())
            )
            # As close to exact arithmetic as Hugging Face's own bfloat16 is, with room for other
            # roundings.
            error = np.abs(engine.logits("only", [row]) - exact)
            assert error.mean() <= 1.5 * np.abs(rounded - exact).mean()


@pytest.mark.slow
def test_compiled_once_and_kept(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels(torch.float32)
    (library,) = (tmp_path / "cache" / "moetel").iterdir()
    assert library.suffix == ".so"
    native.load.cache_clear()
    fresh.setattr(native.subprocess, "run", _only_version(native.subprocess.run))
    assert native.load(torch.float32) is not None


def _only_version(run: Any) -> Any:
    def checked(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["--version"], f"compiled again: {command}"
        return run(command, **options)

    return checked
