"""Products with residuals, against float64: our own kernels, plain operations, a whole layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.plan.residual import LOW_RANK, LOW_RANK_BITS, SIGN, Part, Residual, part_matrix
from tests import helpers
from tests.torch_engine.residual_stores import EVERY_KIND, PROJECTIONS
from torch_engine import native
from torch_engine.experts import residuals
from torch_engine.experts.kernel_pool import laid_out
from torch_engine.experts.residuals import add_part

DTYPES = [torch.bfloat16, torch.float32]


def kernels(dtype: torch.dtype) -> native.Kernels:
    found = native.load(dtype)
    if found is None:
        pytest.skip(f"no kernels for {dtype} here: see native.load for what they need")
    return found


def noise(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def exact_matrices(
    parts: Sequence[Part], shapes: dict[str, tuple[int, ...]], record: np.ndarray
) -> dict[str, torch.Tensor]:
    """A residual's matrices in float64."""
    residual = Residual(0, 0, 0, tuple(parts))
    exact = {p: torch.zeros(shape, dtype=torch.float64) for p, shape in shapes.items()}
    offsets = residual.offsets(shapes)
    for part, offset in zip(parts, offsets, strict=False):
        like = None if part.like is None else record[offsets[part.like] :]
        matrix = part_matrix(record[offset:], part, shapes[part.projection], like)
        exact[part.projection] += torch.from_numpy(matrix).double()
    return exact


def one_expert(
    parts: Sequence[Part], hidden: int, inner: int, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """A random expert with a residual: by our own kernels, and in float64."""
    own = kernels(dtype)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    weights = {
        p: (noise(i, *s) * s[1] ** -0.5).to(dtype) for i, (p, s) in enumerate(shapes.items())
    }
    record = helpers.random_record(parts, shapes, 0, 0.3)
    beside = laid_out({1: (Residual(0, 0, 0, tuple(parts)), record)}, 2, shapes)
    packed = [native.pack(weights[p]) for p in residuals.PROJECTIONS]
    sums = {
        p: weights[p].double() + more for p, more in exact_matrices(parts, shapes, record).items()
    }

    def found(x: torch.Tensor) -> torch.Tensor:
        chosen = np.ones((len(x), 1), dtype=np.int32)
        gates, at = torch.ones(len(x), 1), native.addresses(packed)[None]
        return native.experts(own, x, chosen, gates, at, inner, "silu", beside)

    def exact(x: torch.Tensor) -> torch.Tensor:
        wide = x.double()
        return (F.silu(wide @ sums["gate"].T) * (wide @ sums["up"].T)) @ sums["down"].T

    return found, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "bits", "size"), EVERY_KIND)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(1, 1), (3, 17), (16, 16), (64, 32), (66, 31), (77, 45), (130, 100), (257, 64)],
)
def test_own_kernels_multiply_every_kind_at_any_size(
    dtype: torch.dtype, kind: str, bits: int, size: int, outputs: int, inputs: int
) -> None:
    parts = [Part(projection, kind, bits, size) for projection in PROJECTIONS]
    found, exact = one_expert(parts, outputs, inputs, dtype)
    tolerance = 0.02 if dtype == torch.bfloat16 else 2e-5
    for rows in (1, 2, 3, 4, 5, 7, 19):
        x = noise(rows, rows, outputs).to(dtype)
        expected = exact(x)
        torch.testing.assert_close(
            found(x).double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", LOW_RANK_BITS)
def test_own_kernels_read_one_v_for_two_matrices(dtype: torch.dtype, bits: int) -> None:
    parts = [Part("gate", SIGN, 1, 3), Part("gate", LOW_RANK, bits, 7)]
    parts += [Part("down", LOW_RANK, bits, 7), Part("up", LOW_RANK, bits, 7, 1)]
    found, exact = one_expert(parts, 66, 77, dtype)
    tolerance = 0.02 if dtype == torch.bfloat16 else 2e-5
    for rows in (1, 5, 19):
        x = noise(rows, rows, 66).to(dtype)
        expected = exact(x)
        torch.testing.assert_close(
            found(x).double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_whatever_it_is_computed_with(dtype: torch.dtype) -> None:
    parts = [
        Part("gate", SIGN, 1, 3),
        *(Part("gate", LOW_RANK, bits, 21) for bits in LOW_RANK_BITS),
    ]
    parts += [Part("down", SIGN, 1, 2), Part("down", SIGN, 1, 5), Part("down", LOW_RANK, 4, 9)]
    found, _ = one_expert(parts, 70, 150, dtype)
    x = noise(0, 23, 70).to(dtype)
    together = found(x)
    for row in range(23):
        assert torch.equal(together[row : row + 1], found(x[row : row + 1]))


@pytest.mark.parametrize("chunk", [1 << 20, 100])
@pytest.mark.parametrize(("kind", "bits", "size"), EVERY_KIND)
def test_plain_operations_multiply_every_kind(
    kind: str, bits: int, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA and without our kernels; a chunk of 100 numbers is a row or two."""
    monkeypatch.setattr(residuals, "CHUNK", chunk)
    for outputs, inputs in ((1, 1), (66, 31), (77, 45)):
        shapes = {"gate": (outputs, inputs)}
        part = Part("gate", kind, bits, size)
        record = helpers.random_record([part], shapes, 1, 0.3)
        x, y = noise(3, 5, inputs), noise(4, 5, outputs)
        expected = (
            y.double()
            + x.double() @ torch.from_numpy(part_matrix(record, part, shapes["gate"])).double().T
        )
        data = torch.from_numpy(record)
        add_part(part, data, data[part.v_offset :], shapes["gate"], x, y)
        torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(1, 2, 40), (5, 1, 70), (40, 3, 40)])
def test_a_whole_layer_adds_residuals_of_several_tenants(
    dtype: torch.dtype, threads: int, tokens: int, top_k: int, hidden: int
) -> None:
    """Rows of three tenants share experts; one tenant has none, the others' differ in parts at
    every expert."""
    own = kernels(dtype)
    inter, num_experts, num_tenants = 61, 4, 3
    shapes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
    experts = [
        {p: (noise(9 * e + i, *shapes[p]) * 0.2).to(dtype) for i, p in enumerate(PROJECTIONS)}
        for e in range(num_experts)
    ]
    packed = [[native.pack(e[p]) for p in residuals.PROJECTIONS] for e in experts]
    kinds = [
        [Part("gate", SIGN, 1, 1), Part("down", SIGN, 1, 7)],
        [
            Part("down", LOW_RANK, 4, 5),
            Part("up", LOW_RANK, 16, 9),
            Part("down", LOW_RANK, 2, 13),
            Part("up", SIGN, 1, 2),
        ],
        [Part("up", LOW_RANK, 8, 1)],
        [Part("down", LOW_RANK, 32, 2)],
    ]
    made = {}
    rows = {}
    for tenant in range(1, num_tenants):
        for e in range(num_experts):
            parts, number = kinds[(e + tenant) % 4], tenant * num_experts + e
            record = helpers.random_record(parts, shapes, 7 * e + tenant, 0.1)
            rows[number] = Residual(0, 0, 0, tuple(parts)), record
            made[tenant, e] = exact_matrices(parts, shapes, record)
    rng = np.random.default_rng(0)
    x = noise(3, tokens, hidden).to(dtype)
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
    tenant_of = np.sort(rng.integers(0, num_tenants, size=tokens))[:, None].repeat(top_k, axis=1)
    if tokens == 1:
        tenant_of[:] = 1
    gates = torch.from_numpy(rng.random((tokens, top_k), dtype=np.float32))
    chosen = (tenant_of * num_experts + ids).astype(np.int32)
    weights = np.stack([native.addresses(matrices) for matrices in packed])
    beside = laid_out(rows, num_tenants * num_experts, shapes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = native.experts(own, x, chosen, gates, weights, inter, "silu", beside)
    finally:
        torch.set_num_threads(before)
    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for choice in range(top_k):
            e = int(ids[t, choice])
            more = made.get((int(tenant_of[t, 0]), e), {})
            w = {p: m.double() + more.get(p, 0) for p, m in experts[e].items()}
            inner = F.silu(w["gate"] @ x[t].double()) * (w["up"] @ x[t].double())
            exact[t] += gates[t, choice].double() * (w["down"] @ inner)
    tolerance = (
        {"atol": 0.04, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 1e-5}
    )
    torch.testing.assert_close(out.double(), exact, **tolerance)
