"""Residuals of matrices: optimal where they can be, else as good as reckoned; exact for merged
LoRAs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common import build_store
from common.dtypes import BY_NAME, to_float32
from common.families import ExpertSpec
from common.plan.expert_math import forward
from common.plan.residual import part_matrix
from common.planning.residual_fit import LEFT, MAX_RANK, Choice, fit, sign_group, spectrum
from common.planning.weighting import Dense, Weighting, plain, second_moments, weightings
from tests import checkpoints


def correlated(seed: int, count: int, size: int) -> np.ndarray:
    """Inputs of which a few directions carry most: float32 [count, size]."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((size, size)) * (1.0 / np.arange(1, size + 1))
    return np.asarray(rng.standard_normal((count, size)) @ mixing.T, dtype=np.float32)


def weighted(seed: int, outputs: int, inputs: int) -> Weighting:
    rng = np.random.default_rng(seed)
    x = correlated(seed, 4 * inputs, inputs)
    return Weighting(rng.uniform(0.1, 4, outputs), second_moments(x, np.ones(len(x))), inputs)


def rank_of(seed: int, outputs: int, inputs: int, rank: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((outputs, rank)) @ rng.standard_normal((rank, inputs)))


def left_over(difference: np.ndarray, weighting: Weighting, choice: Choice) -> float:
    left = difference - fit(difference, weighting, "w", choice).added
    return weighting.loss(left) / weighting.loss(difference)


# Weightings.


def test_the_loss_of_an_error_is_its_weighted_mean_square() -> None:
    x = correlated(0, 50, 7)
    gates = np.random.default_rng(1).uniform(0.1, 1, 50)
    s = second_moments(
        np.concatenate([x] * 2000), np.concatenate([gates] * 2000)
    )  # so many that nothing is shrunk
    error, rows = np.random.default_rng(2).standard_normal((5, 7)), np.arange(1.0, 6.0)
    expected = (
        sum(g * float(rows @ (error @ row) ** 2) for g, row in zip(gates, x, strict=True))
        / gates.sum()
    )
    assert Weighting(rows, s, 7).loss(error) == pytest.approx(expected, rel=1e-3)
    assert plain((5, 7)).loss(error) == pytest.approx(float((error**2).sum()))


def test_few_samples_leave_no_direction_free() -> None:
    x = np.zeros((3, 8), dtype=np.float32)
    x[:, 0] = 2.0
    moments = second_moments(x, np.ones(3)).times(np.eye(8))
    assert np.trace(moments) == pytest.approx(4.0)
    assert moments[0, 0] > moments[1, 1] > 0.1 * moments[0, 0] / 8
    for empty in (np.zeros((4, 8), np.float32), x):
        assert np.isfinite(second_moments(empty, np.zeros(len(empty))).times_root(np.eye(8))).all()


@pytest.mark.parametrize(
    ("activation", "gated"), [("silu", True), ("gelu_new", True), ("relu", False)]
)
def test_row_weights_are_what_an_error_of_a_row_does_to_the_output(
    activation: str, gated: bool
) -> None:
    """Against the expert itself: nudge one row of a projection, and see what the output's squared
    error becomes."""
    names = ("gate", "up", "down") if gated else ("up", "down")
    shapes = {n: (8, 12) if n in ("down", "down") else (12, 8) for n in names}
    spec = ExpertSpec("test", ("0",), 1, 8, 12, activation, 1, tuple(shapes.items()))
    rng = np.random.default_rng(0)
    own = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    x, gates = (
        rng.standard_normal((6000, 8)).astype(np.float32),
        rng.uniform(0.3, 1, 6000).astype(np.float32),
    )
    found = weightings(spec, own, x, gates, {n: x @ own[n].T for n in names[:-1]})
    assert set(found) == set(names)
    before = forward(spec, x, own).astype(np.float64)
    squared = gates.astype(np.float64) ** 2
    for name in names[:-1]:
        for row in (0, 5):
            nudged = {n: m.astype(np.float64) for n, m in own.items()}
            nudge = np.zeros(shapes[name])
            nudge[row] = rng.standard_normal(shapes[name][1]) * 1e-3
            nudged[name] = nudged[name] + nudge
            change = forward(spec, x, nudged) - forward(
                spec, x, {n: m.astype(np.float64) for n, m in own.items()}
            )
            true = float(squared @ (change**2).sum(axis=1)) / squared.sum()
            # Inputs and slopes are taken to be independent, which they are but in part.
            assert found[name].loss(nudge) == pytest.approx(true, rel=0.6)
    last = names[-1]
    nudge = rng.standard_normal(shapes[last]) * 1e-2
    change = forward(spec, x, {**own, last: own[last] + nudge}) - before
    true = float(squared @ (change**2).sum(axis=1)) / squared.sum()
    assert found[last].loss(nudge) == pytest.approx(true, rel=0.02)


def test_without_samples_every_weight_counts_the_same() -> None:
    spec = ExpertSpec("test", ("0",), 1, 4, 6, "relu", 1, (("up", (6, 4)), ("down", (4, 6))))
    own = {"up": np.ones((6, 4), np.float32), "down": np.ones((4, 6), np.float32)}
    none = np.zeros((0, 4), np.float32)
    for weighting in weightings(spec, own, none, none[:, 0], {"up": none @ own["up"].T}).values():
        assert weighting.columns is None and (weighting.rows == 1).all()


# Low rank.


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncation_is_the_best_of_its_rank_under_the_weights(
    outputs: int, inputs: int, rank: int
) -> None:
    difference = np.random.default_rng(rank).standard_normal((outputs, inputs))
    weighting = weighted(rank, outputs, inputs)
    assert weighting.columns is not None
    white = weighting.columns.times_root(np.sqrt(weighting.rows)[:, None] * difference)
    values = np.linalg.svd(white, compute_uv=False) ** 2
    best = values[rank:].sum() / values.sum()
    found = left_over(difference, weighting, Choice(((32, rank),)))
    assert found == pytest.approx(best, rel=1e-5)
    drawn = spectrum(difference, weighting)
    np.testing.assert_allclose(drawn.values, values, rtol=1e-9)
    assert drawn.total == pytest.approx(values.sum()) and drawn.shape == (outputs, inputs)
    # A truncation that does not know the weights is worse under them.
    u, s, vt = np.linalg.svd(difference)
    unaware = difference - (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert found < 0.95 * weighting.loss(unaware) / weighting.loss(difference)


def test_large_matrices_are_truncated_nearly_as_well() -> None:
    """Above 512 the largest singular values come from a random projection."""
    rng = np.random.default_rng(0)
    difference = rank_of(1, 600, 560, 40) * 0.2 + rng.standard_normal((600, 560))
    drawn = spectrum(difference, plain(difference.shape))
    exact = np.linalg.svd(difference, compute_uv=False)[:MAX_RANK] ** 2
    assert len(drawn.values) == MAX_RANK
    np.testing.assert_allclose(drawn.values[:40], exact[:40], rtol=1e-2)
    np.testing.assert_allclose(drawn.values, exact, rtol=0.3)


@pytest.mark.parametrize("bits", LEFT)
@pytest.mark.parametrize("weights", [False, True])
def test_what_bits_leave_is_as_the_planner_reckons(bits: int, weights: bool) -> None:
    """`LEFT` on Gaussian matrices: the share of the kept components' energy that rounding loses, a
    little below it, as the vectors of trained weights are less even than Gaussian ones."""
    for seed, (outputs, inputs, rank) in enumerate([(96, 64, 12), (64, 96, 2)]):
        difference = rank_of(seed, outputs, inputs, rank)
        weighting = weighted(seed, outputs, inputs) if weights else plain(difference.shape)
        found = left_over(difference, weighting, Choice(((bits, rank),)))
        assert found <= 1.2 * LEFT[bits]
        assert found >= LEFT[bits] / (5 if bits <= 16 else 100)


@pytest.mark.parametrize("weights", [False, True])
def test_more_bits_and_more_components_are_never_worse(weights: bool) -> None:
    for seed in range(3):
        difference = np.random.default_rng(seed).standard_normal((48, 40))
        weighting = weighted(seed, 48, 40) if weights else plain(difference.shape)
        by_bits = [left_over(difference, weighting, Choice(((b, 10),))) for b in LEFT]
        assert by_bits == sorted(by_bits, reverse=True)
        by_rank = [left_over(difference, weighting, Choice(((4, r),))) for r in (1, 4, 10, 20, 40)]
        assert by_rank == sorted(by_rank, reverse=True)
        signs = left_over(difference, weighting, Choice((), True))
        with_signs = left_over(difference, weighting, Choice(((4, 10),), True))
        assert with_signs < min(by_bits[1], signs)


def test_a_rank_beyond_the_matrix_is_padded() -> None:
    difference = np.random.default_rng(0).standard_normal((6, 9))
    found = fit(difference, plain((6, 9)), "w", Choice(((32, 8),)))
    (part,), (data,) = found.parts, found.packed
    assert part.size == 8 and len(data) == part.nbytes((6, 9))
    assert np.abs(difference - found.added).max() < 1e-5


# Signs.


def test_signs_have_the_scales_of_least_squares() -> None:
    difference = np.random.default_rng(0).standard_normal((10, 200))
    found = fit(difference, plain(difference.shape), "w", Choice((), True))
    made = part_matrix(found.packed[0], found.parts[0], difference.shape)
    left = difference - found.added
    np.testing.assert_array_equal(made > 0, difference > 0)
    # Without weights the best scale of a row is its mean size (BitDelta).
    scale = np.abs(difference).mean(axis=1).astype(BY_NAME["bfloat16"]).astype(np.float64)
    np.testing.assert_allclose(np.abs(made), scale[:, None] * np.ones(200), rtol=1e-2)
    # What a Gaussian's sign leaves of it: 1 - 2 / pi.
    assert (left**2).sum() / (difference**2).sum() == pytest.approx(1 - 2 / np.pi, rel=0.1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_columns_that_cost_most_are_rounded_first(bits: int) -> None:
    """Their errors are made good by many others. In the order of the file it depends on where they
    happen to lie."""
    inputs, losses = 48, []
    scale = 2.0 ** -np.linspace(0, 6, inputs)  # the last columns hardly count
    mixing = np.random.default_rng(1).standard_normal((inputs, inputs)) / inputs**0.5 + np.eye(
        inputs
    )
    for order in (np.arange(inputs), np.arange(inputs)[::-1]):
        found = 0.0
        for seed in range(4):
            difference = np.random.default_rng(seed).standard_normal((32, inputs))[:, order]
            s = np.linalg.cholesky((m := (np.diag(scale) @ mixing)[order]) @ m.T)
            weighting = Weighting(np.ones(32), Dense(s), inputs)
            choice = Choice((), True) if bits == 1 else Choice(((bits, 24),))
            found += left_over(difference, weighting, choice)
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=0.02), "the order of the file does not matter"


def test_under_weights_no_other_scale_is_better() -> None:
    difference, weighting = np.random.default_rng(3).standard_normal((12, 32)), weighted(3, 12, 32)
    group = sign_group(difference.shape)
    assert group == 4
    found = fit(difference, weighting, "w", Choice((), True))
    made = part_matrix(found.packed[0], found.parts[0], difference.shape).astype(np.float64)
    left = difference - found.added
    for start in range(0, 12, group):
        for factor in (0.97, 1.03):  # bfloat16 keeps a scale within 0.4 %
            other = made.copy()
            other[start : start + group] *= factor
            assert weighting.loss(difference - other) > weighting.loss(left)
    unaware = fit(difference, plain(difference.shape), "w", Choice((), True)).added
    assert weighting.loss(left) < weighting.loss(difference - unaware)
    assert spectrum(difference, weighting).sign == pytest.approx(
        1 - weighting.loss(left) / weighting.loss(difference)
    )


# Whatever is chosen.

CHOICES = [
    Choice(((2, 5),)),
    Choice(((8, 2), (2, 7))),
    Choice(((32, 1), (16, 1), (8, 1), (4, 2), (2, 3)), True),
    Choice((), True),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (3, 2), (1, 1), (130, 1)])
def test_what_is_added_is_what_the_bytes_say(choice: Choice, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for difference in (
        rng.standard_normal(shape),
        np.zeros(shape),
        rng.standard_normal(shape) * 1e-12,
    ):
        for weighting in (plain(shape), weighted(0, *shape)):
            found = fit(difference, weighting, "w", choice)
            assert found.parts == list(choice.parts("w", shape))
            made = np.zeros(shape)
            for part, data in zip(found.parts, found.packed, strict=True):
                assert data.dtype == np.uint8 and len(data) == part.nbytes(shape)
                made += part_matrix(data, part, shape)
            np.testing.assert_allclose(
                found.added, made, atol=1e-6 * np.abs(difference).max() + 1e-30
            )
            assert np.isfinite(found.added).all()


def test_no_difference_has_an_empty_spectrum() -> None:
    drawn = spectrum(np.zeros((5, 6)), plain((5, 6)))
    assert drawn.total == drawn.sign == 0 and (drawn.values == 0).all()
    assert drawn.scaled(3.0).total == 0
    half = spectrum(np.ones((5, 6)), plain((5, 6))).scaled(0.5)
    assert half.total == pytest.approx(0.5) and half.values.sum() == pytest.approx(0.5)


# A merged LoRA.

RANK = 1


def lora(model: checkpoints.Model, seed: int, size: float = 0.1) -> checkpoints.Model:
    """The model with a product of two matrices of rank `RANK` added to every projection of every
    expert."""
    rng = np.random.default_rng(seed)
    tensors = dict(model.tensors)
    for name, value in model.tensors.items():
        if ".experts." in name:
            a, b = (rng.standard_normal((n, RANK)) for n in value.shape)
            tensors[name] = (value.astype(np.float32) + a @ b.T * size / RANK**0.5).astype(
                value.dtype
            )
    return checkpoints.Model(model.config, tensors)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_loras_are_rebuilt_from_a_few_bytes(
    dtype: str, with_base: bool, tmp_path: Path
) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_local_experts": 2,
        "num_hidden_layers": 1,
    }
    base = checkpoints.random_mixtral(0, **sizes).to(dtype)
    models = {"base": base} if with_base else {}
    models |= {"ana": lora(base, 1), "bob": lora(base, 2)}
    paths = {n: checkpoints.save(m, tmp_path / n) for n, m in models.items()}
    # Two tenants without their base differ by twice the rank. Factors in 32 bits (of bfloat16,
    # whose differences are rounded, in 16) are what an exact rebuilding needs: 5 % of one model's
    # experts here, where matrices are small.
    store = build_store(tmp_path / "store", paths, policy="residual", extra=0.06)
    assert store.dtype == dtype and store.plan.num_slots == store.experts.num_positions
    assert not store.manifest.merged and {c.owner for c in store.plan.copies} == {0}
    one_model = store.experts.num_positions * store.copy_bytes
    assert 0.04 * one_model < store.residual_bytes == store.extra_bytes <= 0.06 * one_model
    ranks = {p.size for r in store.plan.residuals for p in r.parts if p.bits >= 16}
    assert ranks == {RANK if with_base else 2 * RANK}
    for name in store.tenants:
        for layer in range(store.experts.num_layers):
            for expert in range(store.experts.num_experts):
                served = store.served_expert(name, layer, expert)
                for projection, ref in store.copy_refs(name, layer, expert).items():
                    own = to_float32(ref.read()).astype(np.float64)
                    # Rounding of the largest numbers; of bfloat16, that of either side of the
                    # difference.
                    step = np.abs(own).max() * (2.0**-22 if dtype == "float32" else 2.0**-8)
                    np.testing.assert_allclose(served[projection], own, rtol=0, atol=1.5 * step)
    assert store.manifest.prediction is not None
    worst = max(store.manifest.prediction["losses"])
    assert worst <= (1e-12 if dtype == "float32" else 1e-4) * float(
        (store.distances.matrix**2).sum()
    )
