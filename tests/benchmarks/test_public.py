"""The benchmark of public models, on small stand-ins and without the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import build_store
from tests import helpers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'moetel[lm-eval]'")

from benchmarks.public import __main__ as public
from benchmarks.public.bitdelta import build_bitdelta

EXAMPLES = helpers.REPOSITORY / "examples" / "tenants"
STAND_INS = {"base": EXAMPLES / "en", "sft": EXAMPLES / "fr", "instruct": EXAMPLES / "de"}

pytestmark = pytest.mark.slow


def test_bitdelta_is_signs_and_the_mean_of_a_matrix(tmp_path: Path) -> None:
    store = build_bitdelta(tmp_path / "store", STAND_INS, "base")
    own = build_store(tmp_path / "own", STAND_INS, slots="all")
    base = own.own_expert("base", 0, 1)
    for name in ("sft", "instruct"):
        tuned, served = own.own_expert(name, 0, 1), store.served_expert(name, 0, 1)
        for projection, matrix in served.items():
            difference = tuned[projection] - base[projection]
            expected = np.where(difference > 0, 1, -1) * np.abs(difference).mean()
            np.testing.assert_allclose(matrix - base[projection], expected, rtol=5e-3, atol=1e-6)
    assert all(np.array_equal(store.served_expert("base", 0, 1)[p], base[p]) for p in base)


def test_a_table_is_made_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.chdir(helpers.REPOSITORY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def no_network(*args: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr("benchmarks.public.sets.snapshot_download", no_network)
    command = ["olmoe", "--folder", str(tmp_path / "run"), "--device", "cpu", "--limit", "6"]
    command += ["--include", str(helpers.DATA / "lm_eval"), "--extra", "20%"]
    command += [f"--local={name}={path}" for name, path in STAND_INS.items()]
    assert public.main([*command, "--tasks", "moetel_choice"]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert set(scores) == set(public.METHODS)
    assert all(set(cells) == set(STAND_INS) for cells in scores.values())
    memory = {m: cells["sft"]["experts"]["value"] for m, cells in scores.items()}
    assert memory["alone"] == 3 and memory["average"] == memory["round_robin"] == 1
    assert 1.1 < memory["residual"] <= 1.2 and 1.05 < memory["bitdelta"] < 1.3
    assert all(0 <= cells["sft"]["moetel_choice"]["value"] <= 1 for cells in scores.values())
    text = (tmp_path / "run" / "table.md").read_text()
    assert text.count("\n| ") == 2 + 3 * len(public.METHODS)
    # What is scored is not scored again; another task is.
    capsys.readouterr()
    assert public.main([*command, "--tasks", "moetel_choice"]) == 0
    assert "sft: " not in capsys.readouterr().out
    assert public.main([*command, "--methods", "alone", "--tasks", "moetel_first"]) == 0
    assert "alone, sft: " in capsys.readouterr().out
