"""Policies for one tenant, equal ones, uncalibrated ones, unused experts and half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.build.examples import CalibrationSet
from common.planning.policies import DEFAULT_EXTRA, KNOWN_POLICIES
from common.store.profiles import load_profile
from tests import helpers
from tests.helpers import prompts
from tests.oracle.planning.case import calibration, check, planner, small, tiny


@pytest.mark.parametrize("policy", ["round_robin", "medoid", "mean", "residual"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_one_tenant(policy: str, calibrated: bool, tmp_path: Path) -> None:
    sets = {"only": CalibrationSet.texts(prompts(0, [20] * 3))} if calibrated else {}
    extra = 0.5 if KNOWN_POLICIES[policy].uses_extra else None
    store = small(tmp_path, {"only": tiny()}, policy=policy, extra=extra, calibration=sets)
    check(store, store.experts.num_positions * store.copy_bytes)
    assert store.plan.num_slots == 3 and not store.plan.residuals and not store.manifest.merged
    assert store.manifest.prediction is not None and store.manifest.prediction["losses"] == [0.0]


@pytest.mark.parametrize("policy", ["round_robin", "medoid", "mean", "residual"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_identical_tenants_share_all(policy: str, calibrated: bool, tmp_path: Path) -> None:
    base, other = tiny(), helpers.tuned(tiny(), 1)
    sets = calibration(("a", "b", "c")) if calibrated else {}
    rule = KNOWN_POLICIES[policy]
    extra = 3.0 if rule.uses_extra else None
    store = small(
        tmp_path, {"a": base, "b": base, "c": other}, policy=policy, extra=extra, calibration=sets
    )
    check(store, 4 * 3 * store.copy_bytes)
    assert store.plan.num_slots == 3
    same = small(tmp_path / "same", {"a": base, "b": base}, policy=policy, extra=extra)
    assert same.plan.num_slots == 3 and not same.plan.residuals
    assert same.manifest.prediction is not None and same.manifest.prediction["losses"] == [0.0, 0.0]


@pytest.mark.parametrize("policy", ["medoid", "fit", "residual"])
def test_an_expert_that_nobody_picks(policy: str, tmp_path: Path) -> None:
    """Experts 0 and 1 tie for every token, and 2 never comes before them: it is counted as picked
    once."""
    base = tiny()
    models = {
        "base": base,
        "ana": helpers.tuned(base, 1, 0.03),
        "bob": helpers.tuned(base, 2, 0.03),
    }
    for model in models.values():
        gate = model.model.layers[0].mlp.gate.weight.data
        gate[1] = -gate[0]
        gate[2] = (
            0.0  # its logit lies between the others', so that one of the two is always above it
        )
    for model in models.values():
        model.config.num_experts_per_tok = 1
    extra = 0.2 if KNOWN_POLICIES[policy].uses_extra else None
    store = small(tmp_path, models, policy=policy, extra=extra, calibration=calibration())
    check(store, int(1.2 * 3 * store.copy_bytes))
    losses = planner(store).losses
    single = losses.single()
    for t, name in enumerate(store.tenants):
        profile = load_profile(store, name)
        assert profile is not None and profile.counts[0, 2] == 0 < profile.counts[0, :2].min()
        others = [c for c in range(3) if c != t]
        assert (single[t, 0, 2, others] > 0).all(), "what differs costs something, picked or not"
        assert single[t, 0, 2, others].max() < single[t, 0, :2][:, others].min()
    assert not losses.sampled[:, 0, 2].any() and losses.sampled[:, 0, :2].all()


@pytest.mark.parametrize("policy", ["medoid", "fit", "residual"])
def test_a_tenant_without_calibration_among_others(policy: str, tmp_path: Path) -> None:
    base = tiny()
    models = {"base": base, "ana": helpers.tuned(base, 1), "bob": helpers.tuned(base, 2)}
    sets = {n: s for n, s in calibration().items() if n != "bob"}
    extra = 0.3 if KNOWN_POLICIES[policy].uses_extra else None
    store = small(tmp_path, models, policy=policy, extra=extra, calibration=sets)
    check(store, int((1 + (extra or 0)) * 3 * store.copy_bytes))
    losses = planner(store).losses
    assert losses.measured == ("base", "ana") and losses.unit == "nats"
    assert not losses.sampled[2].any()
    # The same order of size as the others', whose units it is scaled to.
    single = losses.single()
    assert 0.1 < single[2].sum() / single[:2].sum(axis=(1, 2, 3)).mean() < 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("policy", ["mean", "fit", "residual"])
def test_stores_of_half_precision(dtype: str, policy: str, tmp_path: Path) -> None:
    base = tiny()
    models = {"base": base, "ana": helpers.tuned(base, 1), "bob": helpers.tuned(base, 2)}
    extra = 0.3 if KNOWN_POLICIES[policy].uses_extra else None
    store = small(
        tmp_path, models, policy=policy, extra=extra, dtype=dtype, calibration=calibration()
    )
    check(store, int((1 + (extra or 0)) * 3 * store.copy_bytes))
    for slot in store.manifest.merged:
        assert {ref.dtype for ref in store.slot_refs(slot).values()} == {dtype}
    # What was predicted is of the weights as they are stored.
    made = planner(store)
    merged = {
        s: {p: r.read().astype(np.float32) for p, r in store.slot_refs(s).items()}
        for s in store.manifest.merged
    }
    records = [store.residual_ref(i).read() for i in range(len(store.plan.residuals))]
    assert store.manifest.prediction is not None
    again = made.predict(store.plan, merged, records)
    np.testing.assert_allclose(again.losses, store.manifest.prediction["losses"], rtol=1e-6)


def test_without_a_wish_there_is_room_for_every_tenant(tmp_path: Path) -> None:
    base = tiny()
    store = small(tmp_path, {"base": base, "ana": helpers.tuned(base, 1)})
    assert store.plan.policy == "residual"
    one_model = store.experts.num_positions * store.copy_bytes
    assert 0 < store.extra_bytes <= 2 * DEFAULT_EXTRA * one_model
