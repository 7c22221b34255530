"""Plans: what they keep once, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common import Copy, Plan, PlanError, plan_all, plan_round_robin


def test_all_keeps_identical_copies_once() -> None:
    plan = plan_all([[[0, 1]], [[0, 2]], [[3, 1]]], ["a", "b", "c"])
    assert plan.copies == (Copy(0, 0, 0), Copy(0, 0, 2), Copy(0, 1, 0), Copy(0, 1, 1))
    assert plan.users(0) == (0, 1) and plan.users(1) == (2,) and plan.users(2) == (0, 2)
    assert plan.num_misses == 0
    assert plan.copies_per_position.tolist() == [[2, 2]]
    with pytest.raises(PlanError, match=r"several copies.*plan\.copies"):
        _ = plan.owner


def test_a_plan_cannot_be_changed() -> None:
    plan = plan_round_robin(np.ones((2, 2)), 2)
    with pytest.raises(ValueError, match="read-only"):
        plan.serving[0, 0, 0] = 1
    with pytest.raises(AttributeError):
        plan.policy = "other"  # type: ignore[misc]
    assert hash(plan) == hash(Plan.from_json(plan.to_json()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serving": [[[0, 0]]]}, "served by"),  # a copy of another position
        ({"serving": [[[0, 9]]]}, "outside"),
        ({"copies": [[0, 5, 0], [0, 1, 0]]}, "lies outside"),
        ({"serving": None}, "not a plan"),
        ({"tenants": ["a", "b"]}, "not a plan"),
    ],
)
def test_contradicting_json_is_refused(change: dict[str, Any], message: str) -> None:
    good = plan_round_robin([[1.0, 2.0]], ["a"]).to_json()
    assert Plan.from_json(good).num_slots == 2
    with pytest.raises(PlanError, match=message):
        Plan.from_json(good | change)
