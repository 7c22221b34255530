"""`moetel plan` with calibration, traffic, and what was measured before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import common.build.unfinished
import scripts.commands.plan
from common import SamplingParams, Store, build_store, load_engine
from common.build.calibration import calibrate
from common.plan.profile import Profile
from common.planning.planner import Planner
from common.store.profiles import load_profile
from scripts.commands.plan import Asked, offers
from tests import helpers
from tests.scripts.test_plan import rows, run


def test_calibration_is_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = helpers.REPOSITORY / "examples" / "tenants"
    store = build_store(
        tmp_path / "store", {n: examples / n for n in ("en", "fr")}, policy="round_robin"
    )
    measured: list[list[str]] = []

    def counted(store: Store, sets: Any, **options: Any) -> dict[str, Profile]:
        measured.append(list(sets))
        return calibrate(store, sets, **options)

    for module in (scripts.commands.plan, common.build.unfinished):
        monkeypatch.setattr(module, "calibrate", counted)
    prompts = tmp_path / "fr.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in (12, 345, 6789)))
    code, out, _ = run(
        capsys,
        store.path,
        "--calibrate",
        f"fr={prompts}",
        "--extra",
        "5%",
        "--policy",
        "residual",
        "--apply",
    )
    assert code == 0 and "predicted loss in nats" in " ".join(out.split())
    assert measured == [["fr"]]
    after = Store.open(store.path)
    kept = load_profile(after, "fr")
    assert kept is not None and kept.tokens[0] > 20 and load_profile(after, "en") is None
    assert after.verify() == [] and after.manifest.prediction is not None
    assert after.manifest.prediction["unit"] == "nats"
    with load_engine(after) as engine:
        assert engine.generate("fr", "12", SamplingParams(max_new_tokens=20)).text == "douze"


def test_the_mean_is_by_traffic(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--extra", "0", "--extra", "1.0", "--policy", "residual"]
    code, out, _ = run(capsys, store, *options)
    assert code == 0 and "by traffic" not in out
    code, out, _ = run(capsys, store, *options, "--traffic", "ana=8")
    assert code == 0
    assert any("extra" in line and "mean by traffic" in line for line in out.splitlines())
    opened = Store.open(store)
    planner = Planner(opened, traffic={"ana": 8})
    for row, found in zip(
        rows(out),
        offers(opened, planner, "residual", [Asked(extra=0.0), Asked(extra=1.0)]),
        strict=True,
    ):
        weighted = float(found.losses @ [0.1, 0.8, 0.1])
        assert row[-5] == f"{weighted:.4g}" and weighted != pytest.approx(
            float(found.losses.mean()), rel=0.01
        )
    assert re.search(
        r"predicted loss [\d.e-]+ on the mean by traffic, [\d.e-]+ for the worst tenant",
        " ".join(out.split()),
    )


def test_calibration_and_traffic(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store's tenants have no tokenizer: calibration needs one, and says so."""
    path = tmp_path / "ana.jsonl"
    path.write_text(json.dumps({"text": "some text"}))
    code, _, err = run(capsys, store, "--calibrate", f"ana={path}")
    assert code == 1 and "tokenizer" in err
    shares = ["--traffic=ana=1000", "--traffic=bob=1", "--traffic=base=1"]
    code, out, _ = run(capsys, store, "--extra", "0", "--policy", "residual", *shares, "--apply")
    assert code == 0
    after = Store.open(store)
    assert all(copy.mix[1] > 0.99 for copy in after.plan.copies)
    assert after.manifest.provenance["settings"]["traffic"] == {
        "ana": 1000.0,
        "bob": 1.0,
        "base": 1.0,
    }
    # What the store was planned for is what is compared next time.
    code, out, _ = run(capsys, store, "--extra", "0", "--policy", "residual")
    assert code == 0
    _, ana, bob = map(float, rows(out)[0][-3:])
    assert ana < 0.001 * bob
    assert load_profile(after, "ana") is None


def test_what_was_measured_before_is_not_measured_again(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--apply uses what the table was made of, and from then on nothing is measured at all."""
    spectra, seen = Planner._measure_spectra, []

    def watch(self: Planner, p: int, *rest: Any) -> None:
        before = len(self._spectra)
        spectra(self, p, *rest)
        seen.append(len(self._spectra) - before)

    monkeypatch.setattr(Planner, "_measure_spectra", watch)
    code, table, _ = run(capsys, store, "--extra", "20%", "--apply")
    positions = Store.open(store).experts.num_positions
    assert code == 0 and len(seen) > positions
    assert all(seen[:positions]) and not any(seen[positions:])
    code, again, _ = run(capsys, store, "--extra", "20%")
    assert code == 0 and not any(seen[positions:])
    assert rows(again)[0] == rows(table)[0]
    assert "this store now: policy residual" in again
