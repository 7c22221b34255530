"""What stores do with profiles: kept through changes, measured whatever the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import PlanError, RequestError, build_store
from common.build.build import add_tenant, remove_tenant, replan
from common.build.calibration import (
    calibrate,
)
from common.build.examples import CalibrationSet
from common.plan.profile import Profile
from common.store.profiles import load_profile
from tests import helpers
from tests.oracle.build.case import Case


def same(found: Profile | None, expected: Profile | None) -> None:
    assert found is not None and expected is not None
    for field in ("tokens", "counts", "gate_squares", "inputs", "gates", "starts", "sensitivity"):
        mine, theirs = getattr(found, field), getattr(expected, field)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


def test_profiles_survive_the_store_and_its_changes(mixtral: Case, tmp_path: Path) -> None:
    paths, sets = mixtral.paths, mixtral.sets
    two = {n: paths[n] for n in ("base", "ana")}
    store = build_store(
        tmp_path / "store", two, policy="fit", calibration={n: sets[n] for n in two}
    )
    measured = calibrate(store, {n: sets[n] for n in two})
    for name in two:
        same(load_profile(store, name), measured[name])
    assert store.manifest.prediction is not None and store.manifest.prediction["unit"] == "nats"
    # A third without examples: the others keep theirs.
    store = add_tenant(store.path, "bob", paths["bob"])
    assert load_profile(store, "bob") is None
    same(load_profile(store, "ana"), measured["ana"])
    # With examples: its own are measured beside all the others.
    store = remove_tenant(store.path, "bob")
    store = add_tenant(store.path, "bob", paths["bob"], calibration=sets["bob"])
    same(load_profile(store, "bob"), calibrate(store, {"bob": sets["bob"]})["bob"])
    same(load_profile(store, "base"), measured["base"])
    # A plan without them keeps them for the next one; measuring again replaces them.
    store = replan(store.path, slots="all")
    same(load_profile(store, "ana"), measured["ana"])
    assert store.verify() == []
    store = replan(store.path, policy="fit", calibration={"ana": sets["base"]})
    same(load_profile(store, "ana"), calibrate(store, {"ana": sets["base"]})["ana"])
    # What goes with a tenant is gone from the disk.
    before = len(store.manifest.objects)
    store = remove_tenant(store.path, "ana")
    assert (
        set(store.manifest.calibration) == {"base", "bob"} and len(store.manifest.objects) < before
    )
    assert store.verify() == []
    assert store.objects.unreferenced(store.manifest.objects) == []


def test_calibration_is_measured_whatever_the_plan(mixtral: Case, tmp_path: Path) -> None:
    for options in ({"slots": "all"}, {"slots": 0}, {"policy": "round_robin"}):
        store = build_store(
            tmp_path / "store", mixtral.paths, calibration={"ana": mixtral.sets["ana"]}, **options
        )  # type: ignore[arg-type]
        same(load_profile(store, "ana"), calibrate(store, {"ana": mixtral.sets["ana"]})["ana"])


def test_a_measured_profile_is_kept_as_it_is(mixtral: Case, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", mixtral.paths, policy="round_robin")
    (profile,) = calibrate(store, {"ana": mixtral.sets["ana"]}).values()
    store = replan(
        store.path, policy="fit", calibration={"ana": profile, "bob": mixtral.sets["bob"]}
    )
    same(load_profile(store, "ana"), profile)
    assert load_profile(store, "bob") is not None and store.verify() == []
    before = helpers.fingerprint(store.path)
    other = replace(profile, counts=profile.counts[:, :2])
    message = "calibration of 'ana' is of 2 layers with 2 experts of width 16, the store's have 2, 3 and 16; measure"  # noqa: E501
    with pytest.raises(PlanError, match=message):
        replan(store.path, calibration={"ana": other})
    assert helpers.fingerprint(store.path) == before


@pytest.mark.parametrize("change", ["examples", "stranger"])
def test_a_store_is_as_it_was_if_calibration_fails(
    mixtral: Case, tmp_path: Path, change: str
) -> None:
    store = build_store(tmp_path / "store", mixtral.paths, policy="round_robin")
    before = helpers.fingerprint(store.path)
    attempts: dict[str, Callable[[], Any]] = {
        "examples": lambda: replan(
            store.path, calibration={"ana": CalibrationSet.texts([[3, 9999]])}
        ),
        "stranger": lambda: replan(store.path, calibration={"eve": CalibrationSet.texts([[3]])}),
    }
    with pytest.raises(RequestError):
        attempts[change]()
    assert helpers.fingerprint(store.path) == before
