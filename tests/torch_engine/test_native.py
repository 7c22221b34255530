"""Our own CPU kernels: right at every shape that they accept, refused where they do not fit, never
needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import EngineError, load_engine
from common.kernels import build
from common.kernels import target as targets
from tests import helpers
from torch_engine import native
from torch_engine.layers.mlp import ACTIVATIONS
from torch_engine.layers.norm import rms_norm
from torch_engine.products import PlainWeight, linears, pack_native

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
    ("outputs", "inputs"),
    [(64, 64), (1, 2), (8, 1024), (37, 50), (100, 34), (129, 200), (320, 96), (70, 517), (64, 1)],
)
def test_products_are_right_for_any_shape_and_number_of_rows(
    dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    kernels(dtype)
    weight = (noise(0, outputs, inputs) * inputs**-0.5).to(dtype)
    packed = pack_native(weight)
    assert packed.nbytes == weight.nbytes and packed.shape == weight.shape
    for rows in (*range(1, 15), 20, 95, 97, 200):
        x = noise(rows, rows, inputs).to(dtype)
        close(packed.multiply(x), x.double() @ weight.double().T, dtype)


def test_what_follows_an_odd_row_is_not_multiplied() -> None:
    kernels(torch.bfloat16)
    weight, x = noise(0, 64, 33).bfloat16(), noise(1, 7, 33).bfloat16()
    followed = torch.cat([x, torch.full_like(x, torch.nan)])
    out = pack_native(weight).multiply(followed)[:7]
    close(out, x.double() @ weight.double().T, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("tokens", "top_k", "inter"), [(1, 2, 64), (5, 1, 27), (13, 3, 130), (250, 2, 64)]
)
def test_a_whole_layer_of_experts(
    dtype: torch.dtype, activation: str, tokens: int, top_k: int, inter: int
) -> None:
    found = kernels(dtype)
    hidden, num_experts = 40, 5
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    weights = [
        [(noise(9 * e + i, *s) * 0.2).to(dtype) for i, s in enumerate(shapes)]
        for e in range(num_experts)
    ]
    packed = [[native.pack(w) for w in expert] for expert in weights]
    x = noise(3, tokens, hidden).to(dtype)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(num_experts + 1)[:top_k] for _ in range(tokens)]) - 1
    gates = torch.from_numpy(rng.random((tokens, top_k), dtype=np.float32))
    at = np.stack([native.addresses(expert) for expert in packed])
    out = native.experts(found, x, ids.astype(np.int32), gates, at, inter, activation)
    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t, choice in np.argwhere(ids >= 0):  # -1 is no expert
        gate, up, down = (w.double() for w in weights[ids[t, choice]])
        inner = ACTIVATIONS[activation](gate @ x[t].double()) * (up @ x[t].double())
        exact[t] += gates[t, choice].double() * (down @ inner)
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
    kernels(dtype)
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
    close(linears(x, starts, [PlainWeight(w) for w in weights]), exact, dtype)
    assert len(calls) == 1


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
    native._load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    native._load.cache_clear()


@pytest.mark.parametrize("lack", ["compiler", "broken compiler", "AVX2", "x86", "leave"])
def test_without_kernels_torch_does_all_products(
    lack: str, fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if lack == "compiler":
        fresh.setenv("PATH", str(tmp_path))
        fresh.delenv("CXX", raising=False)
    elif lack == "broken compiler":
        fresh.setenv("CXX", "false")
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
        assert engine.stats()["products"] == "torch"
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "target"), [("avx2", "AVX2"), ("avx512", "AVX-512"), ("1", "AVX-512 bf16")]
)
def test_each_target_multiplies_any_number_of_rows(
    fresh: pytest.MonkeyPatch, tmp_path: Path, switch: str, target: str
) -> None:
    fresh.setenv(targets.SWITCH, switch)
    if (found := native.load(torch.bfloat16)) is None or found.target != target:
        pytest.skip(f"this machine compiles no kernels for {target}")
    for dtype in DTYPES:
        for outputs, inputs in ((64, 64), (1, 2), (129, 200), (320, 96), (70, 517)):
            weight = (noise(0, outputs, inputs) * inputs**-0.5).to(dtype)
            packed = pack_native(weight)
            for rows in (1, 2, 3, 4, 5, 6, 7, 95, 97, 200):
                x = noise(rows, rows, inputs).to(dtype)
                close(packed.multiply(x), x.double() @ weight.double().T, dtype)
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
    native._load.cache_clear()
    fresh.setattr(build.subprocess, "run", _only_version(build.subprocess.run))
    assert native.load(torch.float32) is not None


def _only_version(run: Any) -> Any:
    def checked(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["--version"], f"compiled again: {command}"
        return run(command, **options)

    return checked
