"""Every policy on small stores: plans, bytes, predictions, and what engines then answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import PlanError, Store
from common.planning.policies import KNOWN_POLICIES
from tests.helpers import assert_close
from tests.oracle.planning.case import EXTRA, Case, check, rows_of


@pytest.mark.parametrize("policy", [p for p in KNOWN_POLICIES if p != "all"])
def test_engines_answer_as_the_plan_says(case: Case, policy: str) -> None:
    rule = KNOWN_POLICIES[policy]
    extra = EXTRA if rule.uses_extra else None
    store = case.plan(policy, extra=extra)
    one_model = store.experts.num_positions * store.copy_bytes
    check(store, int(one_model * (1 + (extra or 0))))
    assert store.plan.policy == policy and store.plan.num_misses == 0
    assert store.manifest.prediction is not None and store.manifest.prediction["unit"] == "nats"
    if not rule.uses_extra:
        assert store.plan.num_slots == store.experts.num_positions and not store.plan.residuals
    if rule.kinds.any:
        assert store.plan.residuals, "a quarter of a model's bytes are enough for some residual"
        kinds = {(p.kind, p.bits) for r in store.plan.residuals for p in r.parts}
        assert kinds <= {("sign", 1)} if policy == "sign" else True
        assert kinds <= {("low_rank", 16)} if policy == "low_rank" else True
    for t, found in enumerate(case.served(store)):
        for values, expected in zip(
            found, case.logits_of(case.oracle(store, t), rows_of(t)), strict=True
        ):
            assert_close(values, expected, 2e-4)


def test_bytes_buy_predicted_and_measured_quality(case: Case) -> None:
    found: dict[str, tuple[float, float]] = {}
    for name, policy, extra in [
        ("round robin", "round_robin", None),
        ("fit", "fit", 0.0),
        ("a little", "residual", 0.15),
        ("much", "residual", 0.8),
    ]:
        store = case.plan(policy, extra=extra)
        assert store.manifest.prediction is not None
        found[name] = (
            float(np.mean(store.manifest.prediction["losses"])),
            float(case.divergences(store).mean()),
        )
    for which in (0, 1):
        values = [v[which] for v in found.values()]
        assert values == sorted(values, reverse=True), (
            f"{('predicted', 'measured')[which]}: {found}"
        )
        assert values[1] < 0.9 * values[0] and values[3] < 0.5 * values[1]
    # An estimate to first order: the right size, not the right number. Residuals are judged by the
    # samples that they were fitted to, so that of few samples too little is predicted.
    for name in ("round robin", "fit"):
        predicted, measured = found[name]
        assert measured / 4 < predicted < measured * 4, f"{name}: {found}"
    assert all(predicted < 4 * measured + 1e-6 for predicted, measured in found.values()), found


def test_everything_that_tenants_have_is_exact(case: Case) -> None:
    store = case.plan("residual", extra=50.0)
    assert store.manifest.prediction is not None
    assert max(store.manifest.prediction["losses"]) <= 1e-6
    assert store.plan.num_slots == store.experts.num_positions
    assert case.divergences(store).max() < 1e-6


@pytest.mark.parametrize("policy", ["round_robin", "mean", "residual"])
def test_fewer_copies_than_positions(mixtral: Case, policy: str) -> None:
    for slots in (0, 4):
        store = mixtral.plan(policy, slots=slots)
        check(store, slots * store.copy_bytes)
        assert store.plan.num_slots == slots
        assert store.plan.num_misses == 3 * (store.experts.num_positions - slots)
        if slots == 4:
            for t, found in enumerate(mixtral.served(store)):
                for values, expected in zip(
                    found, mixtral.logits_of(mixtral.oracle(store, t), rows_of(t)), strict=True
                ):
                    assert_close(values, expected, 2e-4)


@pytest.mark.parametrize("policy", ["residual", "mean"])
def test_a_budget_in_bytes(mixtral: Case, policy: str) -> None:
    store = Store.open(mixtral.path)
    fixed = max(store.non_expert_bytes(n) for n in store.tenants)
    positions, one = store.experts.num_positions, store.copy_bytes
    for copies in (2.5, 6, 7.3):
        budget = fixed + int(copies * one)
        store = mixtral.plan(policy, budget_bytes=budget)
        assert store.bytes_budget <= budget
        check(store, int(copies * one))
        assert min(store.plan.num_slots, positions) == min(int(copies), positions)
        if copies > positions and KNOWN_POLICIES[policy].uses_extra:
            assert store.extra_bytes > 0
    with pytest.raises(PlanError, match="too small for one tenant"):
        mixtral.plan(policy, budget_bytes=fixed + one - 1)


def test_a_replan_has_the_memory_of_the_plan_before(mixtral: Case) -> None:
    opened = Store.open(mixtral.path)
    budget = max(opened.non_expert_bytes(n) for n in opened.tenants) + 8 * opened.copy_bytes

    def settings(store: Store) -> tuple[Any, Any, Any]:
        found = store.manifest.provenance["settings"]
        return found["slots"], found["budget_bytes"], found["extra"]

    mixtral.plan("low_rank", budget_bytes=budget)
    store = mixtral.plan("residual")
    assert settings(store) == (None, budget, None) and 0 < store.extra_bytes
    assert settings(mixtral.plan("mean")) == (None, budget, None)
    mixtral.plan("low_rank", extra=0.5)
    store = mixtral.plan("sign")
    assert settings(store) == (None, None, 0.5) and 0 < store.extra_bytes <= 3 * store.copy_bytes
    # A policy that cannot use extra bytes takes none, and says so in what the next plan starts
    # from.
    store = mixtral.plan("round_robin")
    assert settings(store) == (None, None, None) and store.extra_bytes == 0
    mixtral.plan("medoid", slots=4)
    assert settings(mixtral.plan("mean")) == (4, None, None)
    assert settings(mixtral.plan("mean", slots=6)) == (6, None, None)
