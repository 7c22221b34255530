"""The benchmark of mixed batches runs at a tiny shape. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import mixed_tenants
from benchmarks.common import Shape
from tests.benchmarks.test_benchmarks import TINY, outputs


def test_mixed_tenants(tmp_path: Path) -> None:
    options = [
        "--steps=4",
        "--warm-up=2",
        "--counted=3",
        "--bandwidth-bytes=10000000",
        "--prompt=5",
    ]
    rows = mixed_tenants.main([*TINY, "--batch", "4", "8", *options, *outputs(tmp_path)])
    assert [(r["batch"], r["tenants"]) for r in rows] == [(4, 1), (4, 4), (8, 1), (8, 4)]
    for one, four in zip(rows[::2], rows[1::2], strict=True):
        assert one["of one tenant's rate"].median == 1.0 and four["of one tenant's rate"].median > 0
        assert 2 <= float(one["experts hit"]) <= 8
        assert one["floor of one tenant / floor"] == "1.000"
        assert float(four["floor, ms"]) > 0
    assert len(json.loads((tmp_path / "rows.json").read_text())[0]["rows"]) == 4
    assert "| 8 | 4 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        mixed_tenants.main(["--batch", "6"])


def test_what_tenants_have_equal_is_read_once(tmp_path: Path) -> None:
    options = [
        "--steps=2",
        "--warm-up=1",
        "--counted=3",
        "--bandwidth-bytes=10000000",
        "--prompt=5",
        "--batch=8",
    ]
    equal = ["--equal", "lm_head", "self_attn"]
    unlike, alike = (
        mixed_tenants.main([*TINY, *options, *more, *outputs(tmp_path)])[1] for more in ([], equal)
    )
    assert float(alike["floor of one tenant / floor"]) > float(
        unlike["floor of one tenant / floor"]
    )
    note = next(
        n for n in json.loads((tmp_path / "rows.json").read_text())[0]["notes"] if "equal" in n
    )
    assert note.startswith("equal: lm_head, self_attn; ")


def test_the_floor_counts_experts_once_and_the_rest_for_every_tenant() -> None:
    shape = Shape()
    one, four = (mixed_tenants.step_bytes(shape, 8, n, 2) for n in (1, 4))
    assert one == shape.step_weights(8) * 2
    # 16 layers of attention and router, and the head: 42 and 33 million weights of two bytes, three
    # times more.
    assert four - one == pytest.approx(3 * 2 * (16 * (2.5 * 2**20 + 8192) + 32000 * 1024), rel=1e-9)
    same = mixed_tenants.step_bytes(shape, 8, 4, 2, equal_weights=32000 * 1024)
    assert same == four - 3 * 2 * 32000 * 1024
