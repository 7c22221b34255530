"""The benchmark of planning runs at a tiny size and writes its tables. No time is judged: machines
are shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import allocation


def test_planning(tmp_path: Path) -> None:
    outputs = [f"--json={tmp_path / 'rows.json'}", f"--markdown={tmp_path / 'table.md'}"]
    sizes = [
        "--cases",
        "2x3x4",
        "1x2x12",
        "--hidden-size=32",
        "--intermediate-size=48",
    ]
    plans = allocation.main([*sizes, *outputs])
    assert [row["case"] for row in plans] == ["2 x 3 x 4", "1 x 2 x 12"]
    for row in plans:
        assert all(float(row[f"gap at {share}"]) >= -1e-9 for share in ("5%", "15%", "40%"))
        assert row["allocation, s"].low > 0
    tables = json.loads((tmp_path / "rows.json").read_text())
    assert [t["title"] for t in tables] == ["Planning"]
    assert "| 2 x 3 x 4 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        allocation.main(["--cases", "2x3"])
