"""Candidates for a position's copy against brute force and a general solver."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from common.planning.configurations import best_mix, mean, merged, owned
from common.planning.losses import gram_of_distances
from tests.common.planning.random_inputs import grams, shares


@pytest.mark.parametrize(("seed", "count"), [(s, n) for s in range(4) for n in (1, 2, 5, 12)])
def test_the_owned_copy_serves_best_of_all(seed: int, count: int) -> None:
    gram, traffic = grams(seed, count), shares(seed, count)
    found = owned(gram, traffic)
    (owner,) = np.flatnonzero(found.mix)
    costs = [sum(traffic[t] * gram[t, c, c] for t in range(count)) for c in range(count)]
    assert found.losses @ traffic == pytest.approx(min(costs))
    assert [found.losses[t] for t in range(count)] == [gram[t, owner, owner] for t in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_the_best_mixture_is_what_a_general_solver_finds(seed: int) -> None:
    count = 2 + seed % 4
    gram, traffic = grams(seed, count), shares(seed, count)
    whole = np.tensordot(traffic, gram, axes=1)
    mix = best_mix(whole)
    best = minimize(
        lambda w: w @ whole @ w,
        np.full(count, 1 / count),
        jac=lambda w: 2 * whole @ w,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12},
    )
    assert mix.sum() == pytest.approx(1) and mix.min() >= 0
    assert best.fun * (1 - 1e-6) <= float(mix @ whole @ mix) <= best.fun * 1.001


def test_the_best_mixture_of_two_on_a_fine_grid() -> None:
    gram = gram_of_distances(np.array([[0, 9.0], [9, 0]]))
    traffic = np.array([0.7, 0.2])
    mix = best_mix(np.tensordot(traffic, gram, axes=1))
    grid = np.linspace(0, 1, 10001)
    values = [
        sum(traffic[t] * np.array([w, 1 - w]) @ gram[t] @ np.array([w, 1 - w]) for t in (0, 1))
        for w in grid
    ]
    assert mix[0] == pytest.approx(grid[int(np.argmin(values))], abs=2e-4)
    # By distances alone the least sum of squares is at the mean, weighted by traffic.
    assert mix[0] == pytest.approx(0.7 / 0.9, abs=2e-4)


def test_a_mixture_costs_what_its_grams_say() -> None:
    for seed in range(4):
        gram, traffic = grams(seed, 5), shares(seed, 5)
        found, plain = merged(gram, traffic), mean(gram)
        for one in (found, plain):
            assert one.mix.sum() == pytest.approx(1)
            for t in range(5):
                assert one.losses[t] == pytest.approx(max(0.0, one.mix @ gram[t] @ one.mix))
        assert found.losses @ traffic <= plain.losses @ traffic * (1 + 1e-9)
        assert (plain.mix == 0.2).all()
