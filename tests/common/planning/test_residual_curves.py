"""Curves of bytes and losses against plain restatements."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from common.plan.residual import LOW_RANK, SIGN, Part, Residual
from common.planning.residual_curves import PRICES, Kinds, choose, curve, curves
from common.planning.residual_fit import LEFT, Choice, Spectrum, sign_group
from tests.common.planning.random_inputs import SHAPES, spectra


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
