"""The benchmark of planning large experts, at a tiny size. No time is judged: machines are
shared."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import planning


def test_every_step_is_reported(tmp_path: Path) -> None:
    sizes = "--hidden-size 32 --intermediate-size 48 --num-attention-heads 4 --num-key-value-heads 2 --tenants 2"  # noqa: E501
    rows = planning.main(
        [*sizes.split(), "--samples=12", "--positions=10", f"--json={tmp_path / 'rows.json'}"]
    )
    steps = [row["step"] for row in rows]
    assert steps[0] == f"{planning.RIDGE}, once" and steps[-2:] == ["all else", "together"]
    assert {"finding candidates", "measuring residuals", "making copies"} < set(steps)
    assert float(rows[-1]["s a position"]) >= max(float(row["s a position"]) for row in rows[1:-1])
    assert json.loads((tmp_path / "rows.json").read_text())
