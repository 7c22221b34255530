"""Benchmarks of products and dispatch, at tiny shapes. No time is judged: machines are shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cpu_products
from benchmarks.common import Spread
from tests.benchmarks.test_benchmarks import outputs


def test_cpu_products(tmp_path: Path) -> None:
    options = [
        "--shapes",
        "128x64",
        "--experts",
        "64x128",
        "--rows",
        "1",
        "8",
        "--chain-bytes=200000",
        "--repeats=1",
    ]
    rows = cpu_products.main([*options, *outputs(tmp_path)])
    found = [(r["dtype"], r["shape"], r["rows"]) for r in rows]
    assert found == [
        (dtype, shape, n)
        for shape in ("128x64", "64x128")
        for dtype in ("bfloat16", "float32")
        for n in (1, 8)
    ]
    assert all(isinstance(r["plain"], Spread) for r in rows)
    assert len(json.loads((tmp_path / "rows.json").read_text())[1]["rows"]) == 4


def test_a_wrong_product_is_found() -> None:
    ways = cpu_products.experts(64, 128, torch.float32, 2)
    x = torch.randn(2, 64)
    cpu_products.measure(ways, x, 1, 1)
    wrong = ways | {"wrong": lambda x: [2 * y for y in ways["plain"](x)]}
    with pytest.raises(AssertionError, match="wrong differs from plain"):
        cpu_products.measure(wrong, x, 1, 1)


@pytest.mark.slow
def test_switch_dispatch(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    from benchmarks import switch_dispatch

    options = [
        "--d-model=16",
        "--d-ff=64",
        "--slots=4",
        "--tokens",
        "1",
        "6",
        "--repeats=1",
        "--layers=2",
    ]
    rows = switch_dispatch.main([*options, "--bandwidth-bytes=1000000", *outputs(tmp_path)])
    assert {r["tokens"] for r in rows} == {1, 6}
    assert {"ragged_dot", "dense: every expert, then select"} <= {r["way"] for r in rows}
