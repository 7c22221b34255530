"""Numbers rounded to few bits, column by column, so that errors cost least together.

`round_columns` finds what GPTQ finds (arXiv 2210.17323, algorithm 1): column k is rounded after
what the columns to come cannot make good of the errors before it was added. With second moments H
that is `-H_kF^-1 H_FB e_B`, k the first of the columns to come F, B the columns before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Step of the best uniform quantiser with so many bits, in standard deviations of a Gaussian (Max
# 1960, table II).
STEPS = {2: 0.9957, 4: 0.3352, 8: 0.0308}
# Columns whose errors reach the later ones in one product.
BLOCK = 64
# Added to all moments, as a share of their mean: directions without any would take any error.
DAMPING = 1e-2


@dataclass(frozen=True)
class Block:
    """Columns start..end in the order of rounding. handed: [columns, rows], what they take of the
    errors before the block; within: [columns, columns], row k holds before the diagonal what column
    k takes of each error in the block."""

    start: int
    end: int
    handed: np.ndarray
    within: np.ndarray


class Feedback(Protocol):
    """How errors of columns are made good by the ones to come."""

    @property
    def order(self) -> np.ndarray:
        """int [n]: columns in the order in which they are rounded. Those whose errors cost most
        come first, while many are left to make them good."""

    def blocks(self, errors: np.ndarray) -> Iterator[Block]:
        """errors: [n, rows] in the order, written by the caller for each block before it asks for
        the next."""


@dataclass(frozen=True)
class DenseFeedback:
    """Of any moments. shares: [n, n] in the order; row k holds before the diagonal what column k
    takes of each error before it."""

    order: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> DenseFeedback:
        """From H [n, n], in their type, by the equal form of QuIP (arXiv 2307.13304, theorem 6):
        the shares are the factor `U` of `U D U^T = H`. H needs no inverse there."""
        order = np.argsort(-np.diag(moments), kind="stable")
        backwards = moments[np.ix_(order[::-1], order[::-1])]
        diagonal = np.diag_indices_from(backwards)
        backwards[diagonal] += DAMPING * (float(backwards[diagonal].mean()) + 1e-30)
        upper = np.linalg.cholesky(backwards)[::-1, ::-1]  # times its transpose: H, in the order
        return cls(order, np.ascontiguousarray((upper / np.diag(upper)).T))

    def blocks(self, errors: np.ndarray) -> Iterator[Block]:
        shares = self.shares.astype(errors.dtype, copy=False)
        for start in range(0, len(errors), BLOCK):
            rows = slice(start, min(start + BLOCK, len(errors)))
            yield Block(start, rows.stop, shares[rows, :start] @ errors[:start], shares[rows, rows])


@dataclass(frozen=True)
class SampledFeedback:
    """Of moments `floor I + Z^T Z` of few samples z_n, where errors reach later columns through
    what they make of the samples.

    vectors: [n, samples] in the order, column k's numbers z_k over the root of the floor.
    takers: [n, samples], `T_k^-1 z_k` with `T_k = I + sum_(j >= k) z_j z_j^T`, by which column k
    takes `sum_(j < k) e_j z_j`. within: of each block, see `Block`.
    """

    order: np.ndarray
    vectors: np.ndarray
    takers: np.ndarray
    within: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, floor: float, roots: np.ndarray) -> SampledFeedback:
        """roots: [samples, n], Z, in whose type all is computed.

        From the last block to the first, each is one step of Woodbury's identity for the inverse of
        T.
        """
        squares = np.einsum("sn,sn->n", roots, roots)
        order = np.argsort(-squares, kind="stable")
        damped = floor + DAMPING * (floor + float(squares.mean()) + 1e-30)
        vectors = np.ascontiguousarray(roots[:, order].T) / roots.dtype.type(damped**0.5)
        inverse, takers = np.eye(len(roots), dtype=roots.dtype), np.empty_like(vectors)
        within = []
        for start in reversed(range(0, len(order), BLOCK)):
            z = vectors[start : start + BLOCK]
            reached = z @ inverse
            products = (reached @ z.T)[::-1, ::-1]
            products[np.diag_indices_from(products)] += 1
            upper = np.linalg.cholesky(products)[::-1, ::-1]
            step = np.linalg.inv(upper) @ reached
            inverse -= step.T @ step
            takers[start : start + BLOCK] = step / np.diag(upper)[:, None]
            within.append(takers[start : start + BLOCK] @ z.T)
        return cls(order, vectors, takers, tuple(reversed(within)))

    def blocks(self, errors: np.ndarray) -> Iterator[Block]:
        kind = errors.dtype
        vectors, takers = (m.astype(kind, copy=False) for m in (self.vectors, self.takers))
        sums = np.zeros((vectors.shape[1], errors.shape[1]), kind)
        for start, within in zip(range(0, len(errors), BLOCK), self.within, strict=True):
            rows = slice(start, start + len(within))
            yield Block(start, rows.stop, takers[rows] @ sums, within.astype(kind, copy=False))
            sums += vectors[rows].T @ errors[rows]


def scales(rows: np.ndarray, bits: int) -> np.ndarray:
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
        error = ((rows - rounded(rows / scale[:, None], bits)[1] * scale[:, None]) ** 2).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best)


def rounded(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of values in units of their scale, and the numbers that the codes stand for."""
    if bits > 8:
        kept = values.astype(np.float16 if bits == 16 else np.float32)
        return kept, kept.astype(np.float64)
    middle = (2**bits - 1) / 2
    codes = np.clip(np.round(values + middle), 0, 2 * middle)
    return codes, codes - middle


def round_columns(
    rows: np.ndarray, bits: int, known: Feedback | None, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and numbers (scales left out) of rows [R, n], for the least error `(r - q) H (r -
    q)^T`.

    scale: one step for each row [R]. known: of H; None where it is diagonal. Computed in the type
    of the rows.
    """
    if known is None or bits > 8:  # beyond 8 bits there is nothing to make good
        return rounded(rows.astype(np.float64) / scale[:, None], bits)
    # A column is a row here, so that what is handed on is added to memory that lies together.
    exact = np.ascontiguousarray((rows / scale[:, None].astype(rows.dtype)).T[known.order])
    middle = (2**bits - 1) / 2
    exact += exact.dtype.type(middle)  # in units of the step, from code 0
    codes, errors = np.empty_like(exact), np.empty_like(exact)
    for block in known.blocks(errors):
        wanted = block.handed
        wanted += exact[block.start : block.end]
        for j in range(block.end - block.start):
            code = block.within[j, :j] @ errors[block.start : block.start + j]
            code += wanted[j]
            k = block.start + j
            np.rint(code, out=code)
            np.maximum(code, 0, out=code)
            np.minimum(code, 2 * middle, out=codes[k])
            np.subtract(exact[k], codes[k], out=errors[k])
    found = np.empty((len(rows), len(exact)), exact.dtype)
    found[:, known.order] = codes.T
    return found, found - exact.dtype.type(middle)
