"""How much an error of a matrix counts, by what is done with the matrix.

It is `sum_n a_n |d_n S|^2`, rows d_n of the error, `S S^T` the second moments of its inputs, a_n
the weight of output n. For the last projection of an expert a_n = 1; for the ones before the
activation a_n is how strongly output n acts on the expert's output, to first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.families import ExpertSpec
from common.plan.expert_math import Matrices, inner_of, inputs_and_output, slope
from common.planning.rounding import DenseFeedback, Feedback, SampledFeedback

# Inputs up to which correlations between them are estimated: a few hundred samples say little of
# more.
MAX_MOMENTS = 2048
# Inputs from which on moments of few samples are computed in single precision.
SINGLE = 1024


@dataclass(frozen=True)
class Diagonal:
    """Second moments of inputs that do not go together. root: float64 [in], S."""

    root: np.ndarray
    feedback: Feedback | None = None

    def times_root(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(matrix * self.root.astype(matrix.dtype))

    def undo_root(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(matrix / self.root.astype(matrix.dtype))

    def root_times(self, columns: np.ndarray) -> np.ndarray:
        return np.asarray(self.root.astype(columns.dtype)[:, None] * columns)

    def times(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(matrix * (self.root**2).astype(matrix.dtype))

    def squares(self, matrix: np.ndarray) -> np.ndarray:
        return _row_squares(self.times_root(matrix))


@dataclass(frozen=True)
class Spread:
    """Second moments `floor I + V^T diag(above) V`, as few samples make them.

    S is their symmetric root. All that is asked of them costs as much as products with V, where a
    matrix [in, in] would cost in / rank times that. directions: V, orthonormal [rank, in], float64
    or float32. above: float64 [rank].
    """

    floor: float
    directions: np.ndarray
    above: np.ndarray

    def _apply(self, matrix: np.ndarray, power: float) -> np.ndarray:
        """[rows, in] times a power of the moments, in the matrix's type."""
        v = self.directions.astype(matrix.dtype, copy=False)
        base = self.floor**power
        more = ((self.floor + self.above) ** power - base).astype(matrix.dtype)
        return np.asarray(matrix * matrix.dtype.type(base) + ((matrix @ v.T) * more) @ v)

    def times_root(self, matrix: np.ndarray) -> np.ndarray:
        return self._apply(matrix, 0.5)

    def undo_root(self, matrix: np.ndarray) -> np.ndarray:
        return self._apply(matrix, -0.5)

    def root_times(self, columns: np.ndarray) -> np.ndarray:
        return self._apply(columns.T, 0.5).T  # it is symmetric

    def times(self, matrix: np.ndarray) -> np.ndarray:
        return self._apply(matrix, 1.0)

    def squares(self, matrix: np.ndarray) -> np.ndarray:
        v = self.directions.astype(matrix.dtype, copy=False)
        shown = (matrix @ v.T) * np.sqrt(self.above).astype(matrix.dtype)
        return np.asarray(self.floor * _row_squares(matrix) + _row_squares(shown))

    @cached_property
    def feedback(self) -> Feedback:
        roots = np.sqrt(self.above).astype(self.directions.dtype)
        return SampledFeedback.of(self.floor, roots[:, None] * self.directions)


@dataclass(frozen=True)
class Dense:
    """Any second moments. root: float64 [in, in], lower triangular S."""

    root: np.ndarray

    def times_root(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(matrix @ self.root.astype(matrix.dtype, copy=False))

    def undo_root(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.solve(self.root.T, matrix.T).T)

    def root_times(self, columns: np.ndarray) -> np.ndarray:
        return np.asarray(self.root.astype(columns.dtype, copy=False) @ columns)

    @cached_property
    def whole(self) -> np.ndarray:
        """S S^T, float64 [in, in]."""
        return np.asarray(self.root @ self.root.T)

    def times(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(matrix @ self.whole.astype(matrix.dtype, copy=False))

    def squares(self, matrix: np.ndarray) -> np.ndarray:
        return _row_squares(self.times_root(matrix))

    @cached_property
    def feedback(self) -> Feedback:
        return DenseFeedback.of(self.whole)


def _row_squares(matrix: np.ndarray) -> np.ndarray:
    """float64 [rows]: the sum of each row's squares."""
    return np.asarray(np.einsum("nk,nk->n", matrix, matrix), dtype=np.float64)


Moments = Diagonal | Spread | Dense


@dataclass(frozen=True)
class Weighting:
    """rows: float64 [out], a_n above. columns: second moments of the inputs; None: all of `inputs`
    inputs count the same."""

    rows: np.ndarray
    columns: Moments | None
    inputs: int

    @property
    def feedback(self) -> Feedback | None:
        """How columns make each other's errors good; None where they cannot."""
        return None if self.columns is None else self.columns.feedback

    def times_moments(self, matrix: np.ndarray) -> np.ndarray:
        """[rows, in] times S S^T, in the matrix's type."""
        return matrix if self.columns is None else self.columns.times(matrix)

    def times_columns(self, matrix: np.ndarray) -> np.ndarray:
        """[rows, in] times S, in the matrix's type."""
        return matrix if self.columns is None else self.columns.times_root(matrix)

    def undo_columns(self, matrix: np.ndarray) -> np.ndarray:
        """[rows, in] times the inverse of S."""
        return matrix if self.columns is None else self.columns.undo_root(matrix)

    def loss(self, matrix: np.ndarray) -> float:
        """The weighted squared error that a matrix [out, in] is."""
        squares = _row_squares(matrix) if self.columns is None else self.columns.squares(matrix)
        return float(self.rows @ squares)

    def of_rows(self, rows: np.ndarray) -> Weighting:
        """How errors of some rows count."""
        return Weighting(self.rows[rows], self.columns, self.inputs)


def plain(shape: tuple[int, ...]) -> Weighting:
    """All weights count the same."""
    return Weighting(np.ones(shape[0]), None, shape[1])


def second_moments(x: np.ndarray, weights: np.ndarray) -> Moments:
    """`E[w x x^T]` of the rows of x [n, in], shrunk towards its mean diagonal. weights: w [n].

    A few hundred samples do not fill the space: the fewer, the more of the estimate is replaced by
    a multiple of the identity, so that directions which no sample shows still count. Beyond
    `MAX_MOMENTS` inputs only the diagonal.
    """
    count, size = x.shape
    w = weights.astype(np.float64) / max(1e-30, float(weights.sum(dtype=np.float64)))
    if size > MAX_MOMENTS:
        diagonal = w @ x.astype(np.float64) ** 2
        share = 1 / (1 + 0.5 * count)
        return Diagonal(np.sqrt((1 - share) * diagonal + share * diagonal.mean() + 1e-12))
    few = 2 * count <= size
    # No moment is below the floor, which is large where samples are few: single precision loses
    # little then.
    dtype = np.float32 if few and size >= SINGLE else np.float64
    share = size / (size + 2.0 * count)
    rows = x.astype(dtype) * np.sqrt((1 - share) * w)[:, None].astype(dtype)
    floor = share / (1 - share) * float(_row_squares(rows).sum()) / size + share * 1e-12
    if few:
        above, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
        kept = above > 1e-10 * max(1e-300, float(above[-1]))
        directions = (vectors[:, kept] / np.sqrt(above[kept])).T.astype(dtype) @ rows
        return Spread(floor, directions, above[kept])
    return Dense(np.linalg.cholesky(rows.T @ rows + floor * np.eye(size)))


def weightings(
    spec: ExpertSpec, weights: Matrices, x: np.ndarray, gates: np.ndarray, before: Matrices
) -> dict[str, Weighting]:
    """How errors of each projection of an expert count, on sampled inputs x [n, H] with gates [n].

    before: float32 [n, out], what the projections that read the input make of it. Without samples
    all weights of a projection count the same.
    """
    names, last = inputs_and_output(spec)
    shapes = dict(spec.projections)
    if not len(x):
        return {name: plain(shape) for name, shape in spec.projections}
    squared = gates.astype(np.float64) ** 2
    into = second_moments(x, squared)
    hidden = inner_of(spec, before)
    found = {
        last: Weighting(np.ones(shapes[last][0]), second_moments(hidden, squared), shapes[last][1])
    }
    act = slope(before[names[0]], spec.activation)
    columns = _row_squares(weights[last].T)
    mean = squared / max(1e-30, squared.sum())
    if len(names) == 1:
        effects = {names[0]: act}
    else:
        up = before[names[1]]
        safe = np.where(np.abs(up) > 1e-6, up, 1e-6)
        effects = {names[0]: act * up, names[1]: hidden / safe}
    for name, effect in effects.items():
        rows = columns * (mean @ (effect.astype(np.float64) ** 2))
        found[name] = Weighting(rows + 1e-6 * rows.mean() + 1e-30, into, shapes[name][1])
    return found
