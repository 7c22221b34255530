"""Residuals fitted to a difference of two matrices, and what they would gain, predicted from its
singular values.

The error of a matrix is weighted as `common.planning.weighting` says: rows by a, inputs by S.
Truncating the singular value decomposition of `diag(a)^(1/2) D S` is then the best low rank (as
SVD-LLM, arXiv 2403.07378, for one side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.dtypes import BFLOAT16, LARGE, working
from common.plan.residual import LOW_RANK, SIGN, Part, pack_low_rank, pack_sign, part_matrix
from common.planning.rounding import DenseFeedback, round_columns, scales
from common.planning.weighting import Weighting

# Share of a component's squared singular value that is left when its vectors are kept in so many
# bits; measured with `fit` below on Gaussian matrices (tests/common/planning/test_residual_fit.py).
LEFT = {2: 0.3, 4: 0.04, 8: 3e-4, 16: 1e-7, 32: 1e-13}
BITS = tuple(LEFT)
# Rows of a large matrix on which it is estimated how much sign bits remove.
SIGN_ROWS = 128
# Singular values that a spectrum keeps; the rest count as not reachable by low rank.
MAX_RANK = 128


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


class _Weighted:
    """`diag(a)^(1/2) D S` of a difference D [out, in], which is not formed where products with few
    columns do."""

    def __init__(self, difference: np.ndarray, weighting: Weighting):
        self._difference, self._columns = difference, weighting.columns
        self._roots = np.sqrt(weighting.rows)[:, None].astype(difference.dtype)
        self.shape, self.dtype = difference.shape, difference.dtype

    def times(self, columns: np.ndarray) -> np.ndarray:
        """[in, k] -> [out, k]"""
        if self._columns is not None:
            columns = self._columns.root_times(columns)
        return np.asarray(self._roots * (self._difference @ columns))

    def rows_times(self, rows: np.ndarray) -> np.ndarray:
        """Of columns [out, k] turned, times it: [k, in]."""
        found = (rows * self._roots).T @ self._difference
        return found if self._columns is None else self._columns.times_root(found)

    def whole(self) -> np.ndarray:
        found = self._difference * self._roots
        return found if self._columns is None else self._columns.times_root(found)


def spectrum(difference: np.ndarray, weighting: Weighting) -> Spectrum:
    """Of a difference [out, in]."""
    return spectra([difference], [weighting])[0]


def spectra(differences: Sequence[np.ndarray], weightings: Sequence[Weighting]) -> list[Spectrum]:
    """Of differences [out, in] of matrices that read the same inputs."""
    totals = [w.loss(d) for d, w in zip(differences, weightings, strict=True)]
    signs = _sign_shares(differences, weightings) if any(totals) else [0.0] * len(totals)
    found = []
    for difference, weighting, total, sign in zip(
        differences, weightings, totals, signs, strict=True
    ):
        values = np.zeros(min(MAX_RANK, *difference.shape))
        if total > 0:
            values = _top_squares(_Weighted(difference, weighting))
        found.append(Spectrum(difference.shape, values, total, sign))
    return found


def _sign_shares(differences: Sequence[np.ndarray], weightings: Sequence[Weighting]) -> list[float]:
    """What share of each one's loss signs remove; estimated on some rows of large ones, which are
    then rounded together, as each row is rounded by itself."""
    rows, counted = list(differences), list(weightings)
    for i, difference in enumerate(differences):
        if difference.size >= LARGE and len(difference) > SIGN_ROWS:
            rng = np.random.default_rng(0)
            some = np.sort(rng.choice(len(difference), SIGN_ROWS, replace=False))
            rows[i], counted[i] = difference[some], weightings[i].of_rows(some)
    if sign_group(differences[0].shape) > 1:
        left = [r - _sign_matrix(r, w)[2] for r, w in zip(rows, counted, strict=True)]
    else:
        first = weightings[0]
        together = Weighting(np.concatenate([w.rows for w in counted]), first.columns, first.inputs)
        stacked = np.concatenate(rows)
        ends = np.cumsum([len(r) for r in rows])[:-1]
        left = np.split(stacked - _sign_matrix(stacked, together)[2], ends)
    before = [w.loss(r) for r, w in zip(rows, counted, strict=True)]
    after = [w.loss(r) for r, w in zip(left, counted, strict=True)]
    return [max(0.0, 1 - a / b) if b > 0 else 0.0 for a, b in zip(after, before, strict=True)]


def _range(matrix: _Weighted, rank: int, iterations: int) -> np.ndarray | None:
    """Orthonormal columns [out, rank + 16] that hold most of the largest singular vectors, by
    random projection with power iterations (Halko et al., arXiv 0909.4061, algorithm 4.4); None
    where the whole decomposition is cheap."""
    if min(matrix.shape) <= 4 * rank or min(matrix.shape) <= 512:
        return None
    random = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 16), np.float32)
    basis = _orthonormal(matrix.times(random.astype(matrix.dtype, copy=False)))
    for _ in range(iterations):
        basis = _orthonormal(matrix.times(matrix.rows_times(basis).T))
    return basis


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """A basis of the span of tall columns, by Cholesky's factor of their products where it exists:
    a tenth of the time of a QR factorisation."""
    exact = columns.astype(np.float64)
    exact /= np.maximum(1e-300, np.linalg.norm(exact, axis=0))
    try:
        factor = np.linalg.cholesky(exact.T @ exact)
    except np.linalg.LinAlgError:  # they span less than they are
        return np.asarray(np.linalg.qr(columns)[0])
    return np.asarray((exact @ np.linalg.inv(factor).T).astype(columns.dtype))


def _top_squares(matrix: _Weighted, rank: int = MAX_RANK) -> np.ndarray:
    """The largest squared singular values, descending, float64 [rank or fewer]; a few per cent too
    small where they hardly fall."""
    basis = _range(matrix, rank, 1)
    if basis is None:
        return np.linalg.svd(matrix.whole(), compute_uv=False)[:rank].astype(np.float64) ** 2
    part = matrix.rows_times(basis)
    squares = np.linalg.eigvalsh((part @ part.T).astype(np.float64))[::-1]
    return np.maximum(squares[:rank], 0)


def _top_right(matrix: _Weighted, rank: int) -> np.ndarray:
    """V^T [r, in] of the largest singular values."""
    basis = _range(matrix, rank, 2)
    if basis is None:
        return np.asarray(np.linalg.svd(matrix.whole(), full_matrices=False)[2][:rank])
    part = matrix.rows_times(basis)
    vectors = np.linalg.eigh((part @ part.T).astype(np.float64))[1][:, ::-1][:, :rank]
    found = vectors.T.astype(part.dtype) @ part
    return np.asarray(found / np.maximum(1e-30, np.linalg.norm(found, axis=1, keepdims=True)))


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
    known, numbers = weighting.feedback, difference
    if known is not None:  # else a sign is that of the weight itself
        each = np.repeat(scale, group)[: len(difference)] + 1e-30
        numbers = round_columns(difference, 1, known, 2 * each)[1]
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


@dataclass(frozen=True)
class Fitted:
    """Parts of one matrix, their packed bytes, and what they add: [out, in], in `working` type."""

    parts: list[Part]
    packed: list[np.ndarray]
    added: np.ndarray


def fit(difference: np.ndarray, weighting: Weighting, projection: str, choice: Choice) -> Fitted:
    """Parts for a difference. Each is fitted to what the ones before it left, so later ones mend
    their rounding."""
    left = difference.astype(working(difference.size))
    added = np.zeros_like(left)
    parts, packed = [], []
    for part in choice.parts(projection, difference.shape):
        if part.kind == SIGN:
            scale, positive, matrix = _sign_matrix(left, weighting)
            data = pack_sign(scale, positive, part.size)
        else:
            data = _fit_low_rank(left, weighting, part)
            matrix = part_matrix(data, part, difference.shape)
            left -= matrix
        added += matrix
        parts.append(part)
        packed.append(data)
    return Fitted(parts, packed, added)


def _fit_low_rank(left: np.ndarray, weighting: Weighting, part: Part) -> np.ndarray:
    """The packed part: v quantised first, u fitted to it exactly in the weighted norm, then
    quantised."""
    weighted = _Weighted(left, weighting)
    vt = _top_right(weighted, part.size)
    # Rows of v in the plain space: D ~ A^(-1/2) U S V^T C^(-1), C lower triangular.
    raw = weighting.undo_columns(vt)
    if len(raw) < part.size:
        raw = np.concatenate([raw, np.zeros((part.size - len(raw), raw.shape[1]), raw.dtype)])
    known = weighting.feedback if part.bits <= 8 else None
    v_codes, v = round_columns(raw, part.bits, known, scales(raw, part.bits))
    v_white = weighting.times_columns(v.astype(raw.dtype, copy=False))
    # Least squares for all of u at once: the rows of v are no longer orthogonal.
    wanted = weighted.times(v_white.T).T.astype(np.float64)
    v_white = v_white.astype(np.float64)
    gram = v_white @ v_white.T
    gram += 1e-9 * (np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
    u = np.linalg.solve(gram, wanted) / np.sqrt(weighting.rows)
    scale = scales(u, part.bits)
    # Columns of u.T, one for each component, each with a step of its own.
    known = DenseFeedback.of(gram * np.outer(scale, scale)) if part.bits <= 8 else None
    u_codes, _ = round_columns((u / scale[:, None]).T, part.bits, known, np.ones(u.shape[1]))
    return pack_low_rank(scale.astype(np.float32), v_codes, u_codes.T, part.bits)
