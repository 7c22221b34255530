"""Candidates against brute force, residual curves against plain restatements, allocations against
trying everything."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from common import PlanError
from common.plan.residual import LOW_RANK, SIGN, Part, Residual
from common.planning.configurations import Config, best_mix, merged_configs, owned_configs
from common.planning.losses import gram_of_distances
from common.planning.residual_curves import PRICES, Curve, Kinds, choose, curve, curves
from common.planning.residual_fit import LEFT, Choice, Spectrum, sign_group
from common.planning.spending import Allocator
from tests.helpers import examples


def grams(seed: int, count: int, size: int = 6, samples: int = 12) -> np.ndarray:
    """Q_t of `count` tenants, [T, T, T]: from random outputs of each on the inputs of each."""
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((count, count, samples * size)) * rng.uniform(
        0.2, 2, (1, count, 1)
    )
    found = np.empty((count, count, count))
    for t in range(count):
        error = outputs[t] - outputs[t, t]
        found[t] = error @ error.T
    return found


def shares(seed: int, count: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).uniform(0.05, 1, count)
    return np.asarray(drawn / drawn.sum())


# Candidates.


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


# Curves.

SHAPES = [(24, 16), (16, 24), (64, 128)]


def spectra(seed: int, shapes: list[tuple[int, int]]) -> list[Spectrum]:
    rng = np.random.default_rng(seed)
    found = []
    for shape in shapes:
        values = np.sort(rng.exponential(size=min(shape)) ** rng.uniform(1, 6))[::-1]
        total = float(values.sum()) * float(rng.uniform(1, 1.3))
        found.append(Spectrum(shape, values, total, float(rng.uniform(0.2, 0.7))))
    return found


def bytes_and_gain(choice: Choice, s: Spectrum) -> tuple[int, float]:
    """What a choice takes by the format, and what the model of residuals says it wins back."""
    low, first = 0.0, 0
    for bits, rank in choice.ranks:
        low += (1 - LEFT[bits]) * float(s.values[first : first + rank].sum())
        first += rank
    parts = choice.parts("p", s.shape)
    return Residual(0, 0, 0, parts).nbytes({"p": s.shape}), low + (
        s.sign * (s.total - low) if choice.sign else 0.0
    )


def every_choice(s: Spectrum, kinds: Kinds, itemsize: int) -> list[tuple[int, float]]:
    """Bytes and gain of all numbers of components in all numbers of bits."""
    found = []
    bits = sorted(kinds.bits, reverse=True)
    for counts in product(range(len(s.values) + 1), repeat=len(bits)):
        if sum(counts) > len(s.values):
            continue
        ranks = tuple((b, n) for b, n in zip(bits, counts, strict=True) if n)
        for sign in (False, True) if kinds.sign else (False,):
            nbytes, gain = bytes_and_gain(Choice(ranks, sign), s)
            if nbytes <= s.shape[0] * s.shape[1] * itemsize:
                found.append((nbytes, gain))
    return found


@pytest.mark.parametrize("kinds", [Kinds((16, 4, 2)), Kinds((8,), False), Kinds((), True)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_choices_are_nearly_the_best_of_all(seed: int, kinds: Kinds) -> None:
    """Padding to 16 bytes is not seen while components are chosen, so they may cost one padding a
    part too much."""
    rng = np.random.default_rng(seed)
    values = np.sort(rng.exponential(size=6) ** 4)[::-1]
    s = Spectrum((40, 48), values, float(values.sum() * 1.1), 0.5)
    s = s.scaled(1.0)
    options = np.array(every_choice(s, kinds, 2))
    for i in range(0, len(PRICES), 3):
        price = float(PRICES[i])
        (chosen,) = choose([s], price, kinds, 2)
        nbytes, gain = bytes_and_gain(chosen, s)
        assert nbytes <= 40 * 48 * 2
        best = float((options[:, 1] - price * options[:, 0]).max())
        assert best - 3 * 16 * price - 1e-9 <= gain - price * nbytes <= best + 1e-9


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kinds", [Kinds(), Kinds((16,), False), Kinds((), True)], ids=str)
def test_curves_are_the_sum_of_their_choices(kinds: Kinds, itemsize: int) -> None:
    for seed in range(3):
        found = spectra(seed, SHAPES)
        whole = sum(s.total for s in found)
        scaled = [s.scaled(s.total / whole) for s in found]
        drawn = curve(found, kinds, itemsize)
        for i, price in enumerate(PRICES):
            made = [
                bytes_and_gain(c, s)
                for c, s in zip(choose(scaled, float(price), kinds, itemsize), scaled, strict=True)
            ]
            assert drawn.nbytes[i] == sum(nbytes for nbytes, _ in made)
            assert drawn.left[i] == pytest.approx(
                max(0.0, 1 - sum(gain for _, gain in made)), abs=1e-12
            )
        assert drawn.nbytes[-1] == 0 and drawn.left[-1] == 1


def test_a_lower_price_never_leaves_more() -> None:
    for seed in range(6):
        for kinds in (Kinds(), Kinds((16,), False), Kinds((2, 4), True)):
            drawn = curve(spectra(seed, SHAPES), kinds, 2)
            # Where residuals would take more than the matrix, they are what still fits and not
            # nothing.
            assert (np.diff(drawn.left) >= -1e-9).all()
            assert drawn.nbytes.max() <= sum(2 * a * b for a, b in SHAPES)


def test_many_curves_are_those_of_each() -> None:
    rows = [spectra(seed, SHAPES) for seed in range(5)]
    rows[2] = [s.scaled(0.0) for s in rows[2]]
    for one, row in zip(curves(rows, Kinds(), 2), rows, strict=True):
        alone = curve(row, Kinds(), 2)
        np.testing.assert_array_equal(one.nbytes, alone.nbytes)
        np.testing.assert_array_equal(one.left, alone.left)
    assert (
        curve(rows[2], Kinds(), 2).nbytes.max() == 0 and curve(rows[2], Kinds(), 2).left.min() == 1
    )
    assert curve(rows[0], Kinds((), False), 2).nbytes.max() == 0


def test_signs_of_a_narrow_matrix_share_scales() -> None:
    assert [sign_group((8, n)) for n in (1, 63, 64, 128, 4096)] == [128, 3, 2, 1, 1]
    assert Choice(((4, 2),), True).parts("w", (8, 64)) == (
        Part("w", LOW_RANK, 4, 2),
        Part("w", SIGN, 1, 2),
    )


# Allocation.

COPY = 1000


def random_case(
    seed: int, positions: int, tenants: int, grid: int
) -> tuple[list[list[Config]], list[list[Curve]]]:
    """Configurations of one to `tenants` copies, and curves of a few convex steps at the prices."""
    rng = np.random.default_rng(seed)
    configs, drawn = [], []
    for p in range(positions):
        gram = grams(1000 * seed + p, tenants) * float(rng.uniform(0.01, 1)) * 1e-2
        configs.append(owned_configs(gram, shares(seed, tenants), tenants))
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
            partial = [(len(config.mixes) * float(COPY), 0.0)]
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
        nbytes = COPY * sum(allocator.copies(made))
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
    assert value == pytest.approx(0, abs=1e-12) and made.bound == pytest.approx(0, abs=1e-12)


def test_points_that_are_not_the_best_of_their_curve_are_not_chosen() -> None:
    """A curve with a dent, as padding to whole words makes them: the bound holds all the same."""
    nbytes, left = np.zeros(len(PRICES)), np.ones(len(PRICES))
    nbytes[:80], left[:80] = 900.0, 0.05
    nbytes[80:90], left[80:90] = 950.0, 0.5  # dearer and worse than what lower prices buy
    configs = [[Config(np.eye(2)[:1], np.zeros(2, dtype=int), np.array([0.0, 1.0]))]]
    dented = Curve(nbytes, left)
    allocator = Allocator(configs, [[[dented, dented]]], np.array([0.5, 0.5]), COPY)
    for mu in 0.5 * PRICES[60:100]:
        _, index, losses, _, value = allocator.at(float(mu))
        best = min(0.5, 0.5 * 0.05 + mu * 900) + mu * COPY
        assert value == pytest.approx(best) and losses[0, 1] in (0.05, 1.0)
        assert index[0, 1] < 80 or index[0, 1] >= 90
    assert allocator.allocate(COPY + 900).losses[0, 1] == 0.05
    assert allocator.allocate(COPY + 899).losses[0, 1] == 1.0


def test_identical_experts_are_kept_once() -> None:
    same = np.zeros((3, 3, 3))
    pair = gram_of_distances(np.array([[0, 0, 1.0], [0, 0, 1], [1, 1, 0]]))
    traffic = np.full(3, 1 / 3)
    for make in (owned_configs, merged_configs):
        configs = [make(g, traffic, 3) for g in (same, pair)]
        made = Allocator(configs, None, traffic, COPY).allocate(10 * COPY)
        assert Allocator(configs, None, traffic, COPY).copies(made) == [1, 2]
        assert (
            made.nbytes == 3 * COPY
            and made.losses.max() == pytest.approx(0, abs=1e-12)
            and made.bound == 0
        )


def test_positions_may_have_different_numbers_of_configurations() -> None:
    traffic = shares(0, 3)
    configs, _ = random_case(0, 4, 3, 3)
    configs[1], configs[3] = configs[1][:1], configs[3][:2]
    allocator = Allocator(configs, None, traffic, COPY)
    for budget in range(4 * COPY, 13 * COPY, COPY):
        made = allocator.allocate(budget)
        assert all(chosen < len(row) for chosen, row in zip(made.chosen, configs, strict=True))
        best = try_everything(configs, None, traffic, budget)
        assert made.bound <= best * (1 + 1e-9) + 1e-15
        assert best * (1 - 1e-9) <= float((made.losses @ traffic).sum())


def test_one_tenant_needs_nothing() -> None:
    configs = [owned_configs(np.zeros((1, 1, 1)), np.ones(1), 1)] * 4
    none = Curve(np.zeros(len(PRICES)), np.ones(len(PRICES)))
    made = Allocator(configs, [[[none]] * 4] * 2, np.ones(1), COPY).allocate(9 * COPY)
    assert made.nbytes == 4 * COPY and made.losses.max() == 0 and made.bound == 0


def test_a_tenant_with_most_of_the_traffic_gets_the_bytes() -> None:
    gram = gram_of_distances(np.array([[0, 1.0], [1, 0]]))
    traffic = np.array([1e-9, 1 - 1e-9])
    configs = [owned_configs(gram, traffic, 2)] * 3
    made = Allocator(configs, None, traffic, COPY).allocate(3 * COPY)
    assert (made.losses[:, 1] == 0).all() and (made.losses[:, 0] == 1).all()


def test_less_than_one_copy_a_position_is_refused() -> None:
    configs = [owned_configs(grams(0, 2), np.full(2, 0.5), 2)] * 3
    with pytest.raises(
        PlanError, match="2999 bytes are less than one copy of each position takes \\(3000\\)"
    ):
        Allocator(configs, None, np.full(2, 0.5), COPY).allocate(3 * COPY - 1)
