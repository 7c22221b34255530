"""Rounding by blocks finds what rounding one column after another finds."""

from __future__ import annotations

import numpy as np
import pytest

from common.planning.rounding import BLOCK, DenseFeedback, SampledFeedback, round_columns


def gptq(rows: np.ndarray, bits: int, moments: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323 with blocks of one column, as printed, in float64: the
    codes."""
    order = np.argsort(-np.diag(moments), kind="stable")
    h = moments[np.ix_(order, order)]
    h = h + 1e-2 * np.trace(h) / len(h) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    left, middle = rows[:, order].astype(np.float64), (2**bits - 1) / 2
    codes = np.empty(rows.shape)
    for j, column in enumerate(order):
        codes[:, column] = np.clip(np.round(left[:, j] / scale + middle), 0, 2 * middle)
        error = (left[:, j] - (codes[:, column] - middle) * scale) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, BLOCK, 2 * BLOCK + 5])
def test_blocks_round_as_the_paper_does(bits: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2 * columns, columns)) @ rng.standard_normal((columns, columns))
    rows, scale = rng.standard_normal((20, columns)), rng.uniform(0.05, 0.5, 20)
    codes, numbers = round_columns(rows, bits, DenseFeedback.of(x.T @ x), scale)
    expected = gptq(rows, bits, x.T @ x, scale)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(numbers, codes - (2**bits - 1) / 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("samples", [1, 20])
def test_so_do_errors_that_are_handed_on_through_samples(
    bits: int, columns: int, samples: int
) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((samples, columns)) * np.linspace(0.1, 2, columns)
    rows, scale = rng.standard_normal((20, columns)), rng.uniform(0.05, 0.5, 20)
    codes, _ = round_columns(rows, bits, SampledFeedback.of(0.3, x), scale)
    moments = x.T @ x + 0.3 * np.eye(columns)
    np.testing.assert_array_equal(codes, gptq(rows, bits, moments, scale))


def test_single_precision_costs_next_to_nothing() -> None:
    """A number on the edge between two codes may go either way; the weighted error may not rise."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 300)) @ rng.standard_normal((300, 300))
    rows, scale, moments = rng.standard_normal((40, 300)), np.full(40, 0.9), x.T @ x
    losses = []
    for dtype in (np.float64, np.float32):
        numbers = round_columns(
            rows.astype(dtype), 2, DenseFeedback.of(moments.astype(dtype)), scale
        )[1]
        error = rows - numbers * scale[:, None]
        losses.append(float(((error @ moments) * error).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
