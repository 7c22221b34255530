"""The benchmark of residuals runs at a tiny shape and writes its table. No time is judged: machines
are shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("jax")

from benchmarks import switch_residuals

TINY = [
    "--d-model=32",
    "--d-kv=8",
    "--d-ff=64",
    "--num-heads=4",
    "--num-layers=2",
    "--num-sparse-layers=1",
]
TINY += [
    "--num-experts=4",
    "--vocab-size=96",
    "--tokens",
    "1",
    "6",
    "--batch",
    "1",
    "3",
    "--prefill=16",
    "--prompt=5",
]
TINY += ["--new-tokens=2", "--repeats=2", "--step-repeats=1", "--bandwidth-bytes=10000000"]
TINY += ["--product-size=64"]


@pytest.mark.slow
@pytest.mark.parametrize("products", ["auto", "plain"])
def test_switch_residuals(tmp_path: Path, products: str) -> None:
    outputs = [f"--json={tmp_path / 'rows.json'}", f"--markdown={tmp_path / 'table.md'}"]
    rows = switch_residuals.main(
        [*TINY, f"--products={products}", f"--scratch={tmp_path}", *outputs]
    )
    what = [
        "layer, 1 tokens, ms",
        "layer, 6 tokens, ms",
        "decode step, batch 1, ms",
        "decode step, batch 3, ms",
    ]
    what.append("first token, prompt 16, ms")
    assert [r["what"] for r in rows[::4]] == what
    assert [r["residuals"] for r in rows] == list(switch_residuals.CASES) * 5
    shares: dict[str, float] = {}
    for row in rows[:4]:
        shares[row["residuals"]] = float(row["bytes beside a copy"].rstrip("%"))
    assert shares["none"] == 0 and shares["both"] == pytest.approx(
        shares["sign"] + shares["low-rank"], abs=0.2
    )
    for row in rows:
        assert row["ms"].low > 0 and float(row["floor, ms"]) > 0
        if row["residuals"] == "none":
            assert row["of none's time"].median == 1
    (saved,) = json.loads((tmp_path / "rows.json").read_text())
    assert len(saved["rows"]) == 20
    assert "| first token, prompt 16, ms | both |" in (tmp_path / "table.md").read_text()
