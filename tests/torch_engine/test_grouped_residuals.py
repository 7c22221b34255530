"""Residuals of sorted rows by Triton kernels, in Triton's interpreter or on a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common import load_engine
from common.plan.residual import LOW_RANK, SIGN, Part, Residual
from tests import helpers
from tests.conftest import Family
from tests.helpers import assert_close, rest_slow
from tests.torch_engine.residual_stores import EVERY_KIND, PROJECTIONS, prepared
from tests.torch_engine.test_residual_products import exact_matrices, noise
from torch_engine.experts import residuals
from torch_engine.experts.residuals import PackedResidual, ResidualRuns, RowResidual

pytest.importorskip("triton", reason="triton is not installed")

from torch_engine.experts.grouped_residuals import ResidualTable, RowTiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rows of each number: 0 adds nothing; 3 has none, 5 has one, 1 and 4 more than a tile takes.
ROWS = {0: 3, 1: 70, 2: 7, 3: 0, 4: 33, 5: 1}
# What numbers 1 to 5 add: several parts, one v of two projections, every kind of code.
PARTS: list[list[Part]] = [
    [Part("gate", SIGN, 1, 1), Part("up", SIGN, 1, 7), Part("down", SIGN, 1, 1000)],
    [
        Part("gate", LOW_RANK, 4, 19),
        Part("gate", SIGN, 1, 3),
        Part("up", LOW_RANK, 4, 19, 0),
        Part("up", LOW_RANK, 8, 5),
        Part("down", LOW_RANK, 2, 6),
        Part("down", LOW_RANK, 32, 2),
    ],
    [Part("up", SIGN, 1, 2)],
    [Part("up", LOW_RANK, 16, 3), Part("down", SIGN, 1, 5), Part("down", LOW_RANK, 8, 9)],
    [Part("gate", LOW_RANK, 2, 33), Part("down", LOW_RANK, 16, 21)],
]


def held(parts: Sequence[Sequence[Part]], shapes: dict[str, tuple[int, ...]]) -> Any:
    """What `ResidentResiduals` has of residuals in one layer, a tenant each, and the records."""
    made = [Residual(i, 0, 0, tuple(each)) for i, each in enumerate(parts)]
    records = [helpers.random_record(each, shapes, i, 0.3) for i, each in enumerate(parts)]
    ends = np.cumsum([0, *(len(record) for record in records)])
    buffer = torch.from_numpy(np.concatenate(records)).to(DEVICE)
    items = [
        PackedResidual(residual, buffer[start:stop], shapes)
        for residual, start, stop in zip(made, ends, ends[1:], strict=False)
    ]
    numbers = np.arange(1, len(parts) + 1).reshape(1, -1, 1)
    return SimpleNamespace(buffer=buffer, items=items, numbers=numbers), records


def close(found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    scale = max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(found.cpu().double(), exact, atol=tolerance * scale, rtol=0)


def check(
    parts: Sequence[Sequence[Part]],
    counts: dict[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """Rows in order and out of order, all projections, against float64 and plain operations."""
    hidden, inner = sizes
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("gate", "up"), (inner, hidden))
    shapes["down"] = hidden, inner
    resident, records = held(parts, shapes)
    table = ResidualTable(resident, DEVICE)
    exact = [exact_matrices(p, shapes, r) for p, r in zip(parts, records, strict=True)]
    numbers = torch.tensor([number for number, count in counts.items() for _ in range(count)])
    rows, share = len(numbers), 2
    starts = np.cumsum([0, *counts.values()])
    runs = [
        RowResidual(int(starts[i]), int(starts[i + 1]), resident.items[number - 1])
        for i, number in enumerate(counts)
        if number and counts[number]
    ]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for ordered in (False, True):
        tiles = RowTiles(table, rows, rows, len(parts))
        total = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
        at = order if ordered else torch.arange(rows)
        given = torch.empty_like(numbers)
        given[at] = numbers
        tiles.cut(given.to(DEVICE), at.int().to(DEVICE) if ordered else None, total)
        for projections, split in ((("gate", "up"), share if ordered else 1), (("down",), 1)):
            outputs, inputs = shapes[projections[0]]
            x = noise(3, -(-rows // split), inputs).to(dtype)
            out = noise(4, rows, len(projections) * outputs).to(dtype)
            expected, plain = out.double(), out[at].float()
            wide = x.repeat_interleave(split, 0)[:rows]
            for row, number in enumerate(given.tolist()):
                for i, name in enumerate(projections if number else ()):
                    more = exact[number - 1][name] @ wide[row].double()
                    expected[row, i * outputs : (i + 1) * outputs] += more
            ResidualRuns(runs).add(projections, wide[at].float().to(DEVICE), plain.to(DEVICE))
            found = out.to(DEVICE)
            tiles.add(projections, x.to(DEVICE), found, split)
            close(found, expected, tolerance)
            close(found[at.to(DEVICE)], plain.double(), tolerance)
            nothing = given == 0
            assert torch.equal(found.cpu()[nothing], out[nothing])


@pytest.mark.parametrize("sizes", rest_slow([(31, 66), (300, 45), (1, 1), (64, 32)]), ids=str)
def test_rows_of_several_tenants(sizes: tuple[int, int]) -> None:
    check(PARTS, ROWS, sizes)


@pytest.mark.parametrize("rows", [1, 9, 30])
@pytest.mark.parametrize(("kind", "bits", "size"), EVERY_KIND)
def test_every_kind_for_few_rows(kind: str, bits: int, size: int, rows: int) -> None:
    parts = [[Part(name, kind, bits, size) for name in ("gate", "down")]] * 2
    check(parts, {0: 1, 1: rows, 2: 2}, (45, 77))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.version.cuda is None or not torch.cuda.is_available(), reason="no CUDA device"
)
def test_rows_of_bfloat16() -> None:
    check(PARTS, ROWS, (320, 448), torch.bfloat16, 0.01)


def tiles_of(numbers: Sequence[int], most: int) -> list[list[int]]:
    found: list[list[int]] = []
    for i, number in enumerate(numbers):
        if not number:
            continue
        if found and found[-1][1:] == [i, number] and i - found[-1][0] < most:
            found[-1][1] += 1
        else:
            found.append([i, i + 1, number])
    return found


@pytest.mark.parametrize("rows", [1, 40, 300, 2500])
def test_a_tile_is_for_one_residual_and_few_are_cut(rows: int) -> None:
    resident, _ = held([[Part("gate", SIGN, 1, 1)]] * 9, dict.fromkeys(PROJECTIONS, (3, 5)))
    table = ResidualTable(resident, DEVICE)
    rng = np.random.default_rng(rows)
    for tokens, behind in ((rows, 0), (rows, rows // 3), (16, 0)):
        numbers = np.sort(rng.integers(0, 10, rows))
        if tokens < rows:  # no residual has more than a token each
            numbers = np.sort(np.minimum(np.arange(rows) // tokens, 9))
            numbers[numbers == 9] = 0
            numbers.sort()
        tiles = RowTiles(table, rows, tokens, 9)
        order = rng.permutation(rows)
        given = np.zeros_like(numbers)
        given[order] = numbers
        expected = tiles_of(numbers[: rows - behind].tolist(), tiles.most)
        total = torch.tensor([rows - behind], dtype=torch.int32, device=DEVICE)
        for where, at in ((numbers, None), (given, torch.from_numpy(order).int().to(DEVICE))):
            tiles.tiles.fill_(77)
            tiles.cut(torch.from_numpy(where).to(DEVICE), at, total)
            found = tiles.tiles.tolist()
            assert found[: len(expected)] == expected
            assert all(begin >= end for begin, end, _ in found[len(expected) :])
        if tokens <= tiles.most:
            assert len(expected) == len({n for _, _, n in expected}), "codes are read twice"


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs without a card")
def test_prompts_take_the_kernels_where_they_work(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepared(tmp_path / "store", family.paths, "several parts")
    way: dict[str, Any] = {"device": "cpu", "experts": "grouped", "products": "plain"}
    rows = helpers.prompts(5, (9, 17))
    calls: list[int] = []
    add_part = residuals.add_part

    def counted(*args: Any) -> None:
        calls.append(1)
        add_part(*args)

    monkeypatch.setattr(residuals, "add_part", counted)
    with load_engine(store, **way) as engine:
        by_kernels = [engine.logits(name, rows) for name in store.tenants]
    assert not calls
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with load_engine(store, **way) as engine:
        plain = [engine.logits(name, rows) for name in store.tenants]
    assert calls
    for found, expected in zip(by_kernels, plain, strict=True):
        assert_close(found, expected)
