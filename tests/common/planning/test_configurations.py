"""Configurations of a position against brute force and a general solver."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize

from common.planning.configurations import best_mix, merged_configs, owned_configs
from common.planning.losses import gram_of_distances
from tests.common.planning.random_inputs import grams, shares


@pytest.mark.parametrize(("seed", "count"), [(s, n) for s in range(4) for n in (1, 2, 5)])
def test_owned_copies_are_the_best_of_all_subsets(seed: int, count: int) -> None:
    gram, traffic = grams(seed, count), shares(seed, count)
    found = owned_configs(gram, traffic, count)
    assert [len(c.mixes) for c in found] == list(range(1, count + 1))
    for config in found:
        best = min(
            sum(traffic[t] * min(gram[t, c, c] for c in chosen) for t in range(count))
            for chosen in combinations(range(count), len(config.mixes))
        )
        assert config.losses @ traffic == pytest.approx(best)
        for t in range(count):
            (owner,) = np.flatnonzero(config.mixes[config.serves[t]])
            assert config.losses[t] == gram[t, owner, owner]


def test_of_many_tenants_copies_are_near_the_best_of_all_subsets() -> None:
    for seed in range(3):
        gram, traffic = grams(seed, 12), shares(seed, 12)
        single = np.einsum("tcc->tc", gram) * traffic[:, None]
        found = owned_configs(gram, traffic, 12)
        assert [len(c.mixes) for c in found] == list(range(1, 13))
        for config in found:
            subsets = np.array(list(combinations(range(12), len(config.mixes))))
            best = single[:, subsets].min(axis=2).sum(axis=0).min()
            assert best * (1 - 1e-9) <= config.losses @ traffic <= 1.1 * best + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_the_best_mixture_is_what_a_general_solver_finds(seed: int) -> None:
    count = 2 + seed % 4
    gram, traffic = grams(seed, count), shares(seed, count)
    mix, loss = best_mix(gram, range(count), traffic)
    whole = np.tensordot(traffic, gram, axes=1)
    best = minimize(
        lambda w: w @ whole @ w,
        np.full(count, 1 / count),
        jac=lambda w: 2 * whole @ w,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12},
    )
    assert mix.sum() == pytest.approx(1) and mix.min() >= 0
    assert loss == pytest.approx(float(mix @ whole @ mix))
    assert best.fun * (1 - 1e-6) <= loss <= best.fun * 1.001


def test_the_best_mixture_of_two_on_a_fine_grid() -> None:
    gram, traffic = (
        gram_of_distances(np.array([[0, 4.0, 9], [4, 0, 1], [9, 1, 0]])),
        np.array([0.7, 0.1, 0.2]),
    )
    mix, loss = best_mix(gram, (0, 2), traffic)
    grid = np.linspace(0, 1, 10001)
    values = [
        sum(
            traffic[t] * np.array([w, 0, 1 - w]) @ gram[t] @ np.array([w, 0, 1 - w]) for t in (0, 2)
        )
        for w in grid
    ]
    assert mix[1] == 0 and mix[0] == pytest.approx(grid[int(np.argmin(values))], abs=2e-4)
    assert loss == pytest.approx(min(values), rel=1e-4)
    # By distances alone the least sum of squares is at the mean, weighted by traffic.
    assert mix[0] == pytest.approx(0.7 / 0.9, abs=2e-4)


def test_mixtures_for_every_number_of_groups() -> None:
    for seed in range(4):
        gram, traffic = grams(seed, 5), shares(seed, 5)
        found = merged_configs(gram, traffic, 5)
        assert [len(c.mixes) for c in found] == [1, 2, 3, 4, 5]
        for config in found:
            assert set(config.serves) == set(range(len(config.mixes)))
            np.testing.assert_allclose(config.mixes.sum(axis=1), 1)
            for number, mix in enumerate(config.mixes):
                # A copy is a mixture of those whom it serves.
                assert set(np.flatnonzero(mix)) <= set(np.flatnonzero(config.serves == number))
            for t, number in enumerate(config.serves):
                mix = config.mixes[number]
                assert config.losses[t] == pytest.approx(max(0.0, mix @ gram[t] @ mix))
        assert (found[-1].losses == 0).all()
        totals = [c.losses @ traffic for c in found]
        assert totals == sorted(totals, reverse=True)


def test_groups_are_the_tenants_that_are_alike() -> None:
    points = np.array([[0.0, 0], [0.1, 0], [5, 5], [5, 5.1]])
    gram = gram_of_distances(((points[:, None] - points) ** 2).sum(axis=2))
    two = merged_configs(gram, np.full(4, 0.25), 4)[1]
    assert two.serves[0] == two.serves[1] != two.serves[2] == two.serves[3]
    assert two.losses @ np.full(4, 0.25) == pytest.approx(0.05**2, rel=1e-3)
