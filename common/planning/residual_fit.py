"""Residuals fitted to a difference of two matrices, and what they would gain, predicted from its
singular values.

The error of a matrix is weighted by what is done with it: `sum_n a_n |d_n S|^2`, rows d_n of the
error, `S S^T` the second moments of its inputs, a_n the weight of output n. For the last projection
of an expert a_n = 1; for the ones before the activation a_n is how strongly output n acts on the
expert's output, to first order. Truncating the singular value decomposition of `diag(a)^(1/2) D S`
is then the best low rank (as SVD-LLM, arXiv 2403.07378, for one side).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.dtypes import BFLOAT16, LARGE, working
from common.families import ExpertSpec
from common.plan.expert_math import Matrices, inner, inputs_and_output, slope
from common.plan.residual import LOW_RANK, SIGN, Part, pack_low_rank, pack_sign, part_matrix

# Share of a component's squared singular value that is left when its vectors are kept in so many
# bits; measured with `fit` below on Gaussian matrices (tests/common/planning/test_residual_fit.py).
LEFT = {2: 0.3, 4: 0.04, 8: 3e-4, 16: 1e-7, 32: 1e-13}
BITS = tuple(LEFT)
# Step of the best uniform quantiser with so many bits, in standard deviations of a Gaussian (Max
# 1960, table II).
STEPS = {2: 0.9957, 4: 0.3352, 8: 0.0308}
# Inputs up to which correlations between them are estimated: a few hundred samples say little of
# more.
MAX_MOMENTS = 2048
# Rows of a large matrix on which it is estimated how much sign bits remove.
SIGN_ROWS = 512
# Singular values that a spectrum keeps; the rest count as not reachable by low rank.
MAX_RANK = 128


@dataclass(frozen=True)
class Weighting:
    """rows: float64 [out], a_n above. columns: float64 [in, in], S, or [in] where S is diagonal;
    None: all of `inputs` inputs count the same."""

    rows: np.ndarray
    columns: np.ndarray | None
    inputs: int

    @property
    def moments(self) -> np.ndarray | None:
        """S S^T, [in, in]; None where it is diagonal, so that no input's error can be made good by
        another."""
        return (
            self.columns @ self.columns.T
            if self.columns is not None and self.columns.ndim == 2
            else None
        )

    def times_moments(self, matrix: np.ndarray) -> np.ndarray:
        """[rows, in] times S S^T, in the matrix's type."""
        if self.columns is None:
            return matrix
        columns = self.columns.astype(matrix.dtype, copy=False)
        return np.asarray(
            matrix * columns**2 if columns.ndim == 1 else matrix @ columns @ columns.T
        )

    def times_columns(self, matrix: np.ndarray) -> np.ndarray:
        """[rows, in] times S, in the matrix's type."""
        if self.columns is None:
            return matrix
        columns = self.columns.astype(matrix.dtype, copy=False)
        return np.asarray(matrix * columns if columns.ndim == 1 else matrix @ columns)

    def undo_columns(self, matrix: np.ndarray) -> np.ndarray:
        """[rows, in] times the inverse of S."""
        if self.columns is None:
            return matrix
        if self.columns.ndim == 1:
            return np.asarray(matrix / self.columns)
        return np.asarray(np.linalg.solve(self.columns.T, matrix.T).T)

    def white(self, matrix: np.ndarray) -> np.ndarray:
        return self.times_columns(matrix * np.sqrt(self.rows)[:, None].astype(matrix.dtype))

    def loss(self, matrix: np.ndarray) -> float:
        """The weighted squared error that a matrix [out, in] is."""
        return float((self.white(matrix) ** 2).sum(dtype=np.float64))

    def of_rows(self, rows: np.ndarray) -> Weighting:
        """How errors of some rows count."""
        return Weighting(self.rows[rows], self.columns, self.inputs)


def plain(shape: tuple[int, ...]) -> Weighting:
    """All weights count the same."""
    return Weighting(np.ones(shape[0]), None, shape[1])


def second_moments(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """S, lower triangular, with `S S^T = E[w x x^T]` of the rows of x, shrunk towards its mean
    diagonal.

    A few hundred samples do not fill the space: the fewer, the more of the estimate is replaced by
    a multiple of the identity, so that directions which no sample shows still count. Beyond
    `MAX_MOMENTS` inputs only the diagonal, [in].
    """
    count, size = x.shape
    w = weights.astype(np.float64)
    if size > MAX_MOMENTS:
        diagonal = w @ (x.astype(np.float64) ** 2) / max(1e-30, w.sum())
        share = 1 / (1 + 0.5 * count)
        return np.asarray(np.sqrt((1 - share) * diagonal + share * diagonal.mean() + 1e-12))
    moments = (x.T.astype(np.float64) * w) @ x.astype(np.float64) / max(1e-30, w.sum())
    share = size / (size + 2.0 * count)
    shrunk = (1 - share) * moments + share * (np.trace(moments) / size + 1e-12) * np.eye(size)
    return np.asarray(np.linalg.cholesky(shrunk))


def weightings(
    spec: ExpertSpec, weights: Matrices, x: np.ndarray, gates: np.ndarray
) -> dict[str, Weighting]:
    """How errors of each projection of an expert count, on sampled inputs x [n, H] with gates [n].

    Without samples all weights of a projection count the same.
    """
    names, last = inputs_and_output(spec)
    shapes = dict(spec.projections)
    if not len(x):
        return {name: plain(shape) for name, shape in spec.projections}
    squared = gates.astype(np.float64) ** 2
    into = second_moments(x, squared)
    hidden = inner(spec, x, weights)
    found = {
        last: Weighting(np.ones(shapes[last][0]), second_moments(hidden, squared), shapes[last][1])
    }
    pre = x @ weights[names[0]].T
    act = slope(pre, spec.activation)
    columns = (weights[last].astype(np.float64) ** 2).sum(axis=0)
    mean = squared / max(1e-30, squared.sum())
    if len(names) == 1:
        effects = {names[0]: act}
    else:
        up = x @ weights[names[1]].T
        safe = np.where(np.abs(up) > 1e-6, up, 1e-6)
        effects = {names[0]: act * up, names[1]: hidden / safe}
    for name, effect in effects.items():
        rows = columns * (mean @ (effect.astype(np.float64) ** 2))
        found[name] = Weighting(rows + 1e-6 * rows.mean() + 1e-30, into, shapes[name][1])
    return found


@dataclass(frozen=True)
class Spectrum:
    """What residuals of one matrix can gain. values: float64 [r], squared singular values of the
    weighted difference, descending; total: their sum with the ones beyond r; sign: share of it that
    one bit a weight removes."""

    shape: tuple[int, ...]
    values: np.ndarray
    total: float
    sign: float

    def scaled(self, total: float) -> Spectrum:
        """The same, in units in which it sums to `total`."""
        factor = total / self.total if self.total > 0 else 0.0
        return Spectrum(self.shape, self.values * factor, self.total * factor, self.sign)


def sign_group(shape: tuple[int, ...]) -> int:
    """Rows that share a scale: as few as keep scales below an eighth of the bits."""
    return max(1, -(-128 // shape[1]))


def spectrum(difference: np.ndarray, weighting: Weighting) -> Spectrum:
    """Of a difference [out, in]. How much signs remove is estimated on some rows of a large one."""
    white = weighting.white(difference)
    total = float((white**2).sum(dtype=np.float64))
    if total <= 0:
        return Spectrum(difference.shape, np.zeros(min(MAX_RANK, *difference.shape)), 0.0, 0.0)
    values = _top_singular(white)[1].astype(np.float64) ** 2
    rows, counted = difference, weighting
    if difference.size >= LARGE and len(difference) > SIGN_ROWS:  # each row is rounded by itself
        some = np.sort(np.random.default_rng(0).choice(len(difference), SIGN_ROWS, replace=False))
        rows, counted = difference[some], weighting.of_rows(some)
    before = counted.loss(rows)
    after = counted.loss(rows - _sign_matrix(rows, counted)[2])
    return Spectrum(
        difference.shape, values, total, max(0.0, 1 - after / before) if before > 0 else 0.0
    )


def _top_singular(
    matrix: np.ndarray, rank: int = MAX_RANK
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [N, r], values [r], V^T [r, K] of the largest singular values; for large matrices by random
    projection with two power iterations (Halko et al., arXiv 0909.4061, algorithm 4.4)."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= 4 * rank or min(matrix.shape) <= 512:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    rng = np.random.default_rng(0)
    random = rng.standard_normal((matrix.shape[1], rank + 16)).astype(matrix.dtype)
    basis = np.linalg.qr(matrix @ random)[0]
    for _ in range(2):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def _sign_matrix(
    difference: np.ndarray, weighting: Weighting
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales [groups], which signs are positive, and the matrix that they make, for little weighted
    error."""
    group = sign_group(difference.shape)
    starts = np.arange(0, len(difference), group)
    scale = np.add.reduceat(np.abs(difference).mean(axis=1), starts) / np.diff(
        [*starts, len(difference)]
    )
    moments, numbers = weighting.moments, difference
    if moments is not None:  # else a sign is that of the weight itself
        each = np.repeat(scale, group)[: len(difference)] + 1e-30
        numbers = _round_columns(
            difference, 1, moments, np.broadcast_to(2 * each[:, None], difference.shape)
        )[1]
    signs = np.where(numbers > 0, difference.dtype.type(1), difference.dtype.type(-1))
    # The scale that fits these signs best.
    behind = weighting.times_moments(signs)
    above = np.add.reduceat(
        weighting.rows * (behind * difference).sum(axis=1, dtype=np.float64), starts
    )
    below = np.add.reduceat(weighting.rows * (behind * signs).sum(axis=1, dtype=np.float64), starts)
    scale = np.maximum(0, above / np.maximum(1e-300, below)).astype(BFLOAT16).astype(np.float64)
    each = np.repeat(scale, group)[: len(difference), None].astype(difference.dtype)
    return scale, signs > 0, signs * each


@dataclass(frozen=True)
class Choice:
    """Parts for one matrix: how many components in how many bits, most bits first, and whether
    signs come on top."""

    ranks: tuple[tuple[int, int], ...] = ()
    sign: bool = False

    def parts(self, projection: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        found = [Part(projection, LOW_RANK, bits, rank) for bits, rank in self.ranks]
        return (*found, Part(projection, SIGN, 1, sign_group(shape))) if self.sign else tuple(found)


def fit(
    difference: np.ndarray, weighting: Weighting, projection: str, choice: Choice
) -> tuple[list[Part], list[np.ndarray], np.ndarray]:
    """Parts, their packed bytes, and what of the difference they leave: [out, in], in `working`
    type.

    Each part is fitted to what the ones before it left, so later ones mend their rounding.
    """
    left = difference.astype(working(difference.size))
    parts, packed = [], []
    for part in choice.parts(projection, difference.shape):
        if part.kind == SIGN:
            scale, positive, _ = _sign_matrix(left, weighting)
            data = pack_sign(scale, positive, part.size)
        else:
            data = _fit_low_rank(left, weighting, part)
        left = left - part_matrix(data, part, difference.shape)
        parts.append(part)
        packed.append(data)
    return parts, packed, left


def _scales(rows: np.ndarray, bits: int) -> np.ndarray:
    """Step of each row [R] for codes of so many bits, or what brings it to 1 for 16 and 32.

    The best of a few between the one for a Gaussian and the one that reaches the largest number.
    """
    most = np.maximum(1e-30, np.abs(rows).max(axis=1))
    if bits > 8:
        return np.asarray(most)
    usual = STEPS[bits] * np.sqrt((rows**2).mean(axis=1)) + 1e-30
    widest = np.maximum(usual, most / ((2**bits - 1) / 2))
    best, least = usual, np.full(len(rows), np.inf)
    for share in (0.0, 0.15, 0.3, 0.5, 0.75, 1.0):
        scale = usual ** (1 - share) * widest**share
        error = ((rows - _rounded(rows / scale[:, None], bits)[1] * scale[:, None]) ** 2).sum(
            axis=1
        )
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best)


def _rounded(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of values in units of their scale, and the numbers that the codes stand for."""
    if bits > 8:
        kept = values.astype(np.float16 if bits == 16 else np.float32)
        return kept, kept.astype(np.float64)
    middle = (2**bits - 1) / 2
    codes = np.clip(np.round(values + middle), 0, 2 * middle)
    return codes, codes - middle


def _round_columns(
    rows: np.ndarray, bits: int, moments: np.ndarray | None, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and numbers (scales left out) of rows [R, n], for the least error `(r - q) moments (r -
    q)^T`.

    Numbers are rounded one column after another, and what rounding cost is made good in the columns
    to come (GPTQ, arXiv 2210.17323, algorithm 1). Columns whose errors cost most come first, while
    many are left to make them good.
    scale: [R, n]. moments: None where they are diagonal.
    """
    if moments is None or bits > 8:  # beyond 8 bits there is nothing to make good
        codes, numbers = _rounded(rows.astype(np.float64) / scale, bits)
        return codes, numbers
    order = np.argsort(-np.diag(moments), kind="stable")
    # A column is a row here, so that what is handed on is added to memory that lies together.
    left, scale = np.array(rows.T[order], dtype=np.float64), np.array(scale.T[order])
    moments = moments[np.ix_(order, order)]
    damped = moments + 1e-2 * (np.trace(moments) / len(moments) + 1e-30) * np.eye(len(moments))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    codes, numbers = np.empty(left.shape), np.empty(left.shape)
    for j, column in enumerate(order):
        codes[column], numbers[column] = found = _rounded(left[j] / scale[j], bits)
        error = (left[j] - found[1] * scale[j]) / upper[j, j]
        left[j + 1 :] -= np.outer(upper[j, j + 1 :], error)
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(numbers.T)


def _fit_low_rank(left: np.ndarray, weighting: Weighting, part: Part) -> np.ndarray:
    """The packed part: v quantised first, u fitted to it exactly in the weighted norm, then
    quantised."""
    white = weighting.white(left)
    _, _, vt = _top_singular(white, part.size)
    # Rows of v in the plain space: D ~ A^(-1/2) U S V^T C^(-1), C lower triangular.
    raw = weighting.undo_columns(vt)
    if len(raw) < part.size:
        raw = np.concatenate([raw, np.zeros((part.size - len(raw), raw.shape[1]))])
    scale = np.broadcast_to(_scales(raw, part.bits)[:, None], raw.shape)
    v_codes, v = _round_columns(raw, part.bits, weighting.moments, scale)
    v_white = weighting.times_columns(v)
    # Least squares for all of u at once: the rows of v are no longer orthogonal.
    gram = v_white @ v_white.T
    gram += 1e-9 * (np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
    u = np.linalg.solve(gram, v_white @ white.T) / np.sqrt(weighting.rows)
    scale = _scales(u, part.bits)
    u_codes, _ = _round_columns(u.T, part.bits, gram, np.broadcast_to(scale, u.T.shape))
    return pack_low_rank(scale.astype(np.float32), v_codes, u_codes.T, part.bits)
