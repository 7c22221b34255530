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
    assert [(r["dtype"], r["rows"]) for r in rows] == [
        (d, n) for d in ("bfloat16", "float32") for n in (1, 8)
    ]
    assert all(isinstance(r["plain"], Spread) and r["best"] in r for r in rows)
    whole = json.loads((tmp_path / "rows.json").read_text())[1]["rows"]
    assert len(whole) == 4 and all(r["best"] in cpu_products.FEED_FORWARDS for r in whole)


def test_a_wrong_feed_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = cpu_products.FeedForwards(64, 128, torch.float32, 200_000)
    chain.measure(2, 1)
    right = chain.ways(2)
    assert "plain" in right
    monkeypatch.setattr(
        chain, "ways", lambda rows: right | {"wrong": lambda: [2 * y for y in right["plain"]()]}
    )
    with pytest.raises(AssertionError, match="wrong differs from plain"):
        chain.measure(2, 1)


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
