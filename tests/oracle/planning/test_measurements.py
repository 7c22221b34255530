"""What a build measured is kept, found again bit for bit, and used only where it still holds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import common.planning.planner
from common import Store, StoreError, add_tenant, build_store
from common.build.build import remove_tenant, replan
from common.build.examples import CalibrationSet
from common.build.extend import extend_store
from common.plan.profile import Profile
from common.planning.losses import Losses
from common.planning.measurements import Measurements
from common.planning.planner import Outcome, Planner
from common.store.change import set_plan
from common.store.profiles import load_profile
from tests import helpers
from tests.helpers import prompts, rest_slow

NAMES = ("base", "ana", "bob")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    sizes = {
        "num_local_experts": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 2,
    }
    base = helpers.random_mixtral(0, **sizes)
    models = [base, *(helpers.tuned(base, seed, 0.03) for seed in (1, 2, 3))]
    return {n: helpers.save(m, root / n) for n, m in zip((*NAMES, "cy"), models, strict=True)}


def texts(seed: int) -> CalibrationSet:
    return CalibrationSet.texts(prompts(seed, [30] * 12))


@pytest.fixture(scope="module")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tenants, two of them calibrated, planned by the default policy."""
    tenants = {n: checkpoints[n] for n in NAMES}
    sets = {n: texts(i) for i, n in enumerate(NAMES[:2])}
    return build_store(tmp_path_factory.mktemp("built") / "store", tenants, calibration=sets).path


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"


def profiles_of(store: Store) -> dict[str, Profile]:
    return {n: p for n in store.tenants if (p := load_profile(store, n))}


def anew(path: Path, traffic: Mapping[str, float] | None = None) -> Planner:
    """A planner that measures by itself."""
    store = Store.open(path)
    return Planner(store, profiles_of(store), traffic)


class Measured(Exception):
    """Something was measured though it was known."""


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise Measured

    for name in ("measure_losses", "best_ridge"):
        monkeypatch.setattr(common.planning.planner, name, refuse)
    monkeypatch.setattr(Planner, "_choose_ridge", refuse)
    monkeypatch.setattr(common.planning.planner.PositionPlanner, "spectra", refuse)


def assert_same_losses(a: Losses, b: Losses) -> None:
    for f in fields(Losses):
        np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name), err_msg=f.name)


def assert_same(a: Outcome, b: Outcome) -> None:
    assert a.plan.to_json() == b.plan.to_json()
    assert a.merged.keys() == b.merged.keys()
    for slot, weights in a.merged.items():
        for name, matrix in weights.items():
            np.testing.assert_array_equal(matrix, b.merged[slot][name])
    for x, y in zip(a.records, b.records, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.prediction.losses, b.prediction.losses)


def test_what_is_kept_is_what_would_be_measured(built: Path) -> None:
    kept, fresh = Measurements.from_store(Store.open(built)), anew(built)
    fresh.allocator("residual")
    wanted = fresh.measurements
    assert kept is not None and kept.key == wanted.key and kept.ridge == wanted.ridge is not None
    assert_same_losses(kept.losses, wanted.losses)
    assert (
        kept.fitted.keys() == wanted.fitted.keys() and kept.spectra.keys() == wanted.spectra.keys()
    )
    assert kept.fitted and kept.spectra
    for p, losses in wanted.fitted.items():
        np.testing.assert_array_equal(kept.fitted[p], losses)
    for key, rows in wanted.spectra.items():
        for a, b in zip(kept.spectra[key], rows, strict=True):
            for x, y in zip(a, b, strict=True):
                assert (x.shape, x.total, x.sign) == (y.shape, y.total, y.sign)
                # Where nothing is lacking there is one 0 for all.
                np.testing.assert_array_equal(
                    x.values, np.pad(y.values, (0, len(x.values) - len(y.values)))
                )


@pytest.mark.parametrize("policy", ["residual", "sign", "fit", "merge", "medoid"])
@pytest.mark.parametrize("extra", rest_slow([0.1, 0.0, 1.5]))
def test_plans_are_the_same_and_nothing_is_measured_again(
    built: Path, request: pytest.FixtureRequest, policy: str, extra: float
) -> None:
    store = Store.open(built)
    nbytes = int(extra * store.experts.num_positions * store.copy_bytes)
    wanted = anew(built).plan(policy, extra_bytes=nbytes)
    request.getfixturevalue("nothing_is_measured")
    known = Planner(store, profiles_of(store), known=Measurements.from_store(store))
    assert_same(known.plan(policy, extra_bytes=nbytes), wanted)


@pytest.mark.usefixtures("nothing_is_measured")
def test_a_store_is_planned_anew_without_measuring(store: Path) -> None:
    before = Store.open(store).manifest.measurements
    choices: list[dict[str, Any]] = [
        {"extra": 0.3},
        {"policy": "fit"},
        {"policy": "residual", "slots": 4},
        {"policy": "round_robin"},
    ]
    for options in choices:
        found = replan(store, **options)
        assert found.manifest.measurements == before and not found.verify()
    found = set_plan(store, found.plan)
    assert found.manifest.measurements == before and not found.verify()
    with pytest.raises(Measured):
        replan(store, traffic={"ana": 3.0})


@pytest.mark.slow
def test_other_calibration_traffic_or_tenants_are_measured_anew(
    store: Path, checkpoints: dict[str, Path]
) -> None:
    keys = {Store.open(store).manifest.measurements["key"]}

    def check(found: Store) -> None:
        """What is kept now is new, and what a planner that knows nothing would measure."""
        settings = found.manifest.provenance["settings"]
        kept, fresh = Measurements.from_store(found), anew(store, settings["traffic"])
        fresh.allocator("residual")
        assert kept is not None and kept.key not in keys
        keys.add(kept.key)
        assert kept.key == fresh.measurements.key
        assert_same_losses(kept.losses, fresh.losses)
        assert not found.verify()
        assert not found.objects.unreferenced(set(found.manifest.objects))

    check(replan(store, traffic={"ana": 3.0}))
    check(replan(store, calibration={"bob": texts(9)}))
    check(add_tenant(store, "cy", checkpoints["cy"]))
    check(remove_tenant(store, "base"))


def test_beside_a_plan_they_wait_for_the_tenants_that_they_are_of(
    store: Path, checkpoints: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    before = Store.open(store).manifest.measurements
    grown = extend_store(store, "cy", checkpoints["cy"])
    assert grown.manifest.measurements == before and not grown.verify()
    found, kept = anew(store), Measurements.from_store(grown)
    assert kept is not None and kept.losses.tenants == NAMES
    assert (
        Planner(grown, profiles_of(grown), known=kept).losses.gram.shape == found.losses.gram.shape
    )
    shrunk = remove_tenant(store, "cy", keep_plan=True)
    assert shrunk.manifest.measurements == before and not shrunk.verify()
    request.getfixturevalue("nothing_is_measured")
    assert replan(store, extra=0.2).manifest.measurements == before


def test_a_store_without_measurements_is_read(
    store: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plain = build_store(
        tmp_path / "plain",
        {"base": checkpoints["base"], "ana": checkpoints["ana"]},
        policy="medoid",
    )
    assert plain.manifest.measurements is None and Measurements.from_store(plain) is None
    # Its distances say all that is needed for these; residuals are measured, and kept from then on.
    assert replan(plain.path, policy="merge").manifest.measurements is None
    assert replan(plain.path, policy="residual").manifest.measurements is not None


def test_damage_is_found_and_named(store: Path) -> None:
    opened = Store.open(store)
    tables = opened.manifest.measurements["tables"]
    for object_id in [entry["object"] for entry in tables.values()]:
        path = helpers.flip(opened, object_id)
        assert [p.file for p in opened.verify()] == [path]
        with pytest.raises(StoreError, match=f"{object_id} does not match"):
            Measurements.from_store(opened)
        helpers.flip(opened, object_id)
    assert not opened.verify()
