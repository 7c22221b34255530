"""The benchmark of planning runs at a tiny size and writes its tables. No time is judged: machines
are shared."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks import allocation
from benchmarks.common import Spread
from common.planning.configurations import Config
from common.planning.residual_curves import Curve


def test_planning(tmp_path: Path) -> None:
    outputs = [f"--json={tmp_path / 'rows.json'}", f"--markdown={tmp_path / 'table.md'}"]
    sizes = [
        "--cases",
        "2x3x4",
        "1x2x12",
        "--hidden-size=32",
        "--intermediate-size=48",
        "--small-cases=2",
    ]
    plans, small = allocation.main([*sizes, *outputs])
    assert [row["case"] for row in plans] == ["2 x 3 x 4", "1 x 2 x 12"]
    for row in plans:
        assert all(float(row[f"gap at {share}"]) >= -1e-9 for share in ("5%", "15%", "40%"))
        assert row["allocation, s"].low > 0
    assert [row["extra"] for row in small] == ["5%", "15%", "40%", "100%"]
    for row in small:
        assert isinstance(row["plan / best"], Spread)
        assert row["plan / best"].low >= 1 - 1e-9 >= row["bound / best"].high - 2e-9
    tables = json.loads((tmp_path / "rows.json").read_text())
    assert [t["title"] for t in tables] == ["Planning", "Small cases"]
    assert "| 2 x 3 x 4 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        allocation.main(["--cases", "2x3"])


def test_trying_everything_finds_the_best() -> None:
    """The benchmark's own search against every combination, without leaving any out on the way."""
    case = allocation.Case(1, 2, 2, 4, 4)
    rng = np.random.default_rng(0)
    configs = [
        [
            Config(np.eye(2)[:1], np.array([0, 0]), np.array([0.0, v])),
            Config(np.eye(2), np.array([0, 1]), np.zeros(2)),
        ]
        for v in (1.0, 3.0)
    ]
    drawn = [
        [[Curve(rng.integers(0, 90, 5) * 1.0, rng.random(5)) for _ in range(2)] for _ in range(2)]
    ]
    for budget in (
        2 * case.copy_bytes,
        2 * case.copy_bytes + 60,
        3 * case.copy_bytes + 30,
        4 * case.copy_bytes,
    ):
        best = np.inf
        for choice in product(range(2), repeat=2):
            for points in product(range(6), repeat=4):
                nbytes, value = 0.0, 0.0
                for p, t in product(range(2), range(2)):
                    config, curve, i = configs[p][choice[p]], drawn[0][p][t], points[2 * p + t]
                    nbytes += 0.0 if i == 5 else curve.nbytes[i]
                    value += config.losses[t] * (1.0 if i == 5 else curve.left[i]) / 2
                nbytes += (
                    sum(len(configs[p][c].mixes) for p, c in enumerate(choice)) * case.copy_bytes
                )
                if nbytes <= budget:
                    best = min(best, value)
        assert allocation.exact(configs, drawn, case, budget) == pytest.approx(best)
