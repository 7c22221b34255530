"""The paper's rule: its published map, Algorithm 1 against a re-statement."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import Plan, PlanError, plan_round_robin
from tests import helpers
from tests.helpers import examples


def test_published_distances_give_the_published_map() -> None:
    # Source: repository hamid-74/Multi-MoE, measured by the paper's authors; 217 slots on an 80 GB
    # card.
    distance = json.loads((helpers.DATA / "mixtral_expert_distance.json").read_text())
    published = np.array(json.loads((helpers.DATA / "mixtral_expert_map.json").read_text()))
    plan = plan_round_robin(distance, ["instruct", "base"], 217)
    assert published.shape == (32, 8)
    assert (plan.owner == published).sum() == 256
    assert np.issubdtype(plan.owner.dtype, np.integer)


def restated(
    distance: list[list[float]], num_tenants: int, slots: int
) -> dict[tuple[int, int], int]:
    """Algorithm 1 in plain Python: take the least distant position left, first in row-major order,
    owners in turn."""
    left = {(i, j): d for i, row in enumerate(distance) for j, d in enumerate(row)}
    owner = {}
    for turn in range(slots):
        best = min(left, key=lambda place: (left[place], place))
        owner[best] = turn % num_tenants
        del left[best]
    return owner


@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_round_robin_is_algorithm_1(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    # Few values, so that ties are frequent.
    value = st.one_of(st.sampled_from([0.0, 1.0, 2.5]), st.floats(0, 10))
    distance = data.draw(
        st.lists(
            st.lists(value, min_size=experts, max_size=experts), min_size=layers, max_size=layers
        )
    )
    tenants = data.draw(st.integers(1, 7))
    slots = data.draw(st.integers(0, layers * experts))
    plan = plan_round_robin(distance, [f"t{i}" for i in range(tenants)], slots)
    expected = restated(distance, tenants, slots)
    owner = plan.owner
    for layer in range(layers):
        for expert in range(experts):
            assert owner[layer, expert] == expected.get((layer, expert), -1)
            for tenant in range(tenants):
                assert plan.weights_of(tenant, layer, expert) == expected.get(
                    (layer, expert), tenant
                )
    assert plan.num_misses == tenants * (layers * experts - slots)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_without_slots_every_position_is_resident() -> None:
    plan = plan_round_robin(np.ones((3, 2)), 4)
    assert plan.tenants == ("tenant0", "tenant1", "tenant2", "tenant3")
    assert plan.owner.tolist() == [[0, 1], [2, 3], [0, 1]]
    assert plan.users(0) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0, float("nan")]], 2), r"\(0, 1\) is nan.*finite"),
        (([1.0], 2), r"expected \[layers, experts\]"),
        (([[1.0, 2.0]], 2, 3), r"3 slots.*give 0\.\.2, or 'all'"),
        (([[1.0, 2.0]], 2, -1), r"-1 slots"),
        (([[1.0]], []), "at least one tenant"),
        (([[1.0]], ["a", "a"]), "repeat: a, a"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_round_robin(*arguments)
