"""Moments of few samples, kept as directions, against the matrices that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from common.planning.rounding import DenseFeedback, round_columns
from common.planning.weighting import Spread, second_moments


@pytest.mark.parametrize("count", [1, 5, 20])
def test_directions_of_few_samples_are_the_whole_moments(count: int) -> None:
    rng = np.random.default_rng(count)
    size = 40
    x, w = rng.standard_normal((count, size)).astype(np.float32), rng.uniform(0.1, 1, count)
    share = size / (size + 2.0 * count)
    moments = (x.astype(np.float64).T * w) @ x / w.sum()
    whole = (1 - share) * moments + share * np.trace(moments) / size * np.eye(size)
    found = second_moments(x, w)
    assert isinstance(found, Spread) and len(found.above) == count
    matrix = rng.standard_normal((6, size))
    np.testing.assert_allclose(found.times(matrix), matrix @ whole, rtol=1e-9, atol=1e-12)
    white = found.times_root(matrix)
    np.testing.assert_allclose((white**2).sum(), np.trace(matrix @ whole @ matrix.T), rtol=1e-9)
    np.testing.assert_allclose(found.undo_root(white), matrix, rtol=1e-9)
    np.testing.assert_allclose(found.squares(matrix), np.einsum("nk,nk->n", white, white))
    np.testing.assert_allclose(found.root_times(matrix.T), white.T)
    codes = [
        round_columns(matrix, 2, known, np.ones(6))[0]
        for known in (found.feedback, DenseFeedback.of(whole))
    ]
    np.testing.assert_array_equal(*codes)


def test_samples_of_nothing_leave_moments_that_can_be_undone() -> None:
    found = second_moments(np.zeros((3, 40), np.float32), np.zeros(3))
    assert np.isfinite(found.undo_root(found.times_root(np.eye(40)))).all()
