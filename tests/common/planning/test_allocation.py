"""Allocations of bytes against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import PlanError
from common.planning.allocation import Allocator
from common.planning.configurations import Config, mean, merged, owned
from common.planning.losses import gram_of_distances
from common.planning.residual_curves import PRICES, Curve
from tests.common.planning.random_inputs import grams, shares
from tests.helpers import examples

COPY = 1000


def random_case(
    seed: int, positions: int, tenants: int, grid: int
) -> tuple[list[list[Config]], list[list[Curve]]]:
    """Three candidates a position, and curves of a few convex steps at the prices."""
    rng = np.random.default_rng(seed)
    configs, drawn = [], []
    for p in range(positions):
        gram = grams(1000 * seed + p, tenants) * float(rng.uniform(0.01, 1)) * 1e-2
        traffic = shares(seed, tenants)
        configs.append([merged(gram, traffic), owned(gram, traffic), mean(gram)])
        row = []
        for _ in range(tenants):
            steps = rng.integers(1, 400, size=grid) * 8
            at = np.sort(
                rng.choice(np.arange(len(PRICES) - 40, len(PRICES) - 14), grid, replace=False)
            )[::-1]
            gain = np.minimum(PRICES[at] * steps * rng.uniform(1.01, 1.4, grid), 0.9 / grid)
            order = np.argsort(-gain / steps)
            steps, gain = np.cumsum(steps[order]), np.cumsum(gain[order])
            points = np.concatenate([[[0.0, 1.0]], np.stack([steps, 1 - gain], axis=1)])
            best = (points[:, 1] + PRICES[:, None] * points[:, 0]).argmin(axis=1)
            row.append(Curve(points[best, 0], points[best, 1]))
        drawn.append(row)
    return configs, drawn


def try_everything(
    configs: list[list[Config]], drawn: list[list[Curve]] | None, traffic: np.ndarray, budget: float
) -> float:
    """Least traffic-weighted loss within the budget, over all configurations and points of
    curves."""
    frontier = [(0.0, 0.0)]
    for p, row in enumerate(configs):
        options = []
        for config in row:
            partial = [(float(COPY), 0.0)]
            for t, loss in enumerate(config.losses):
                points = {(0.0, 1.0)}
                if drawn is not None:
                    points |= set(
                        zip(drawn[p][t].nbytes.tolist(), drawn[p][t].left.tolist(), strict=True)
                    )
                partial = [
                    (b + n, v + traffic[t] * loss * left) for b, v in partial for n, left in points
                ]
            options += partial
        joined = sorted((b + n, v + w) for b, v in frontier for n, w in options if b + n <= budget)
        frontier, least = [], np.inf
        for (
            nbytes,
            value,
        ) in joined:  # what is neither cheaper nor better than another is never part of the best
            if value < least:
                frontier.append((nbytes, value))
                least = value
    return min(value for _, value in frontier)


def stepped(
    configs: list[list[Config]], drawn: list[list[Curve]] | None, traffic: np.ndarray
) -> Allocator:
    return Allocator(configs, None if drawn is None else [drawn, drawn], traffic, COPY)


@pytest.mark.parametrize("residuals", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_allocations_against_trying_everything(seed: int, residuals: bool) -> None:
    positions, tenants = 4, 3
    traffic = shares(seed, tenants)
    configs, found = random_case(seed, positions, tenants, 3)
    drawn = found if residuals else None
    allocator = stepped(configs, drawn, traffic)
    for extra in (0, 0.1, 0.3, 0.7, 1.1, 1.6, 3):
        budget = int(positions * COPY * (1 + extra))
        best = try_everything(configs, drawn, traffic, budget)
        made = allocator.allocate(budget)
        value = float((made.losses @ traffic).sum())
        assert made.nbytes <= budget
        assert made.bound <= best * (1 + 1e-9) + 1e-15, "the bound is no bound"
        assert best * (1 - 1e-9) - 1e-15 <= value
        # What is left over could at most have bought the next step of one position.
        assert value - made.bound <= max(float(row[0].losses @ traffic) for row in configs)
        nbytes = COPY * positions
        if drawn is not None:
            for p, t in product(range(positions), range(tenants)):
                loss = configs[p][made.chosen[p]].losses[t]
                if np.isfinite(made.price[p, t]):
                    at = int(np.flatnonzero(PRICES == made.price[p, t])[0])
                    nbytes += int(drawn[p][t].nbytes[at])
                    loss *= drawn[p][t].left[at]
                assert made.losses[p, t] == pytest.approx(loss)
        assert nbytes == made.nbytes


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 10**6), residuals=st.booleans())
def test_more_bytes_never_cost_more(seed: int, residuals: bool) -> None:
    traffic = shares(seed, 3)
    configs, found = random_case(seed, 12, 3, 3)
    allocator = stepped(configs, found if residuals else None, traffic)
    last = np.inf
    for budget in range(12 * COPY, 12 * COPY * 3 + 1, 12 * 125):
        made = allocator.allocate(budget)
        value = float((made.losses @ traffic).sum())
        assert made.nbytes <= budget and made.bound <= value * (1 + 1e-9) + 1e-15
        assert value <= last * (1 + 1e-9) + 1e-15, f"{budget} bytes cost more than fewer"
        last = value


def test_points_that_are_not_the_best_of_their_curve_are_not_chosen() -> None:
    """A curve with a dent, as padding to whole words makes them: the bound holds all the same."""
    nbytes, left = np.zeros(len(PRICES)), np.ones(len(PRICES))
    nbytes[:80], left[:80] = 900.0, 0.05
    nbytes[80:90], left[80:90] = 950.0, 0.5  # dearer and worse than what lower prices buy
    configs = [[Config(np.eye(2)[0], np.array([0.0, 1.0]))]]
    dented = Curve(nbytes, left)
    allocator = Allocator(configs, [[[dented, dented]]], np.array([0.5, 0.5]), COPY)
    for mu in 0.5 * PRICES[60:100]:
        _, index, losses, _, value = allocator.at(float(mu))
        best = min(0.5, 0.5 * 0.05 + mu * 900) + mu * COPY
        assert value == pytest.approx(best) and losses[0, 1] in (0.05, 1.0)
        assert index[0, 1] < 80 or index[0, 1] >= 90
    assert allocator.allocate(COPY + 900).losses[0, 1] == 0.05
    assert allocator.allocate(COPY + 899).losses[0, 1] == 1.0


def test_positions_may_have_different_numbers_of_configurations() -> None:
    traffic = shares(0, 3)
    configs, _ = random_case(0, 4, 3, 3)
    configs[1], configs[3] = configs[1][:1], configs[3][:2]
    allocator = Allocator(configs, None, traffic, COPY)
    for budget in (4 * COPY, 9 * COPY):
        made = allocator.allocate(budget)
        assert all(chosen < len(row) for chosen, row in zip(made.chosen, configs, strict=True))
        best = try_everything(configs, None, traffic, budget)
        assert made.bound <= best * (1 + 1e-9) + 1e-15
        assert best * (1 - 1e-9) <= float((made.losses @ traffic).sum())


def test_one_tenant_needs_nothing() -> None:
    configs = [[owned(np.zeros((1, 1, 1)), np.ones(1))]] * 4
    none = Curve(np.zeros(len(PRICES)), np.ones(len(PRICES)))
    made = Allocator(configs, [[[none]] * 4] * 2, np.ones(1), COPY).allocate(9 * COPY)
    assert made.nbytes == 4 * COPY and made.losses.max() == 0 and made.bound == 0


def test_a_tenant_with_most_of_the_traffic_gets_the_bytes() -> None:
    gram = gram_of_distances(np.array([[0, 1.0], [1, 0]]))
    traffic = np.array([1e-9, 1 - 1e-9])
    configs = [[owned(gram, traffic)]] * 3
    made = Allocator(configs, None, traffic, COPY).allocate(3 * COPY)
    assert (made.losses[:, 1] == 0).all() and (made.losses[:, 0] == 1).all()


def test_less_than_one_copy_a_position_is_refused() -> None:
    configs = [[owned(grams(0, 2), np.full(2, 0.5))]] * 3
    with pytest.raises(
        PlanError, match="2999 bytes are less than one copy of each position takes \\(3000\\)"
    ):
        Allocator(configs, None, np.full(2, 0.5), COPY).allocate(3 * COPY - 1)
