"""Numbers rounded to few bits, column by column, so that errors cost least together.

`round_columns` finds what GPTQ finds (arXiv 2210.17323, algorithm 1), in the equal form of QuIP
(arXiv 2307.13304, theorem 6): column k is rounded after the errors of the columns before it were
added, times column k of the factor `U` of `U D U^T = H`. H needs no inverse there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Step of the best uniform quantiser with so many bits, in standard deviations of a Gaussian (Max
# 1960, table II).
STEPS = {2: 0.9957, 4: 0.3352, 8: 0.0308}
# Columns whose errors reach the later ones in one product.
BLOCK = 64


@dataclass(frozen=True)
class Feedback:
    """How errors of columns are made good by the ones to come.

    order: int [n], columns in the order in which they are rounded. shares: [n, n] in that order;
    row k holds before the diagonal what column k takes of each error before it.
    """

    order: np.ndarray
    shares: np.ndarray


def feedback(moments: np.ndarray) -> Feedback:
    """From second moments H [n, n], in their type.

    Columns whose errors cost most come first, while many are left to make them good.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    backwards = order[::-1]
    return feedback_of_ordered(order, moments[np.ix_(backwards, backwards)])


def feedback_of_ordered(order: np.ndarray, backwards: np.ndarray) -> Feedback:
    """backwards: H [n, n] with the last column of the order first; damped here, in place, by 1 % of
    its mean diagonal."""
    diagonal = np.diag_indices_from(backwards)
    backwards[diagonal] += 1e-2 * (float(backwards[diagonal].mean()) + 1e-30)
    upper = np.linalg.cholesky(backwards)[::-1, ::-1]  # times its transpose: H, in the order
    return Feedback(order, np.ascontiguousarray((upper / np.diag(upper)).T))


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
    shares, middle = known.shares.astype(exact.dtype, copy=False), (2**bits - 1) / 2
    wanted, errors = exact + exact.dtype.type(middle), np.empty_like(exact)
    codes, exact = np.empty_like(exact), wanted.copy()  # both in units of the step, from code 0
    for start in range(0, len(exact), BLOCK):
        end = min(start + BLOCK, len(exact))
        for j in range(start, end):
            code = shares[j, start:j] @ errors[start:j]
            code += wanted[j]
            np.rint(code, out=code)
            np.maximum(code, 0, out=code)
            np.minimum(code, 2 * middle, out=codes[j])
            np.subtract(exact[j], codes[j], out=errors[j])
        wanted[end:] += shares[end:, start:end] @ errors[start:end]
    found = np.empty((len(rows), len(exact)), exact.dtype)
    found[:, known.order] = codes.T
    return found, found - exact.dtype.type(middle)
