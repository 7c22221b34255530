"""What residuals of a position gain for the bytes that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common.plan.residual import ALIGNMENT, LOW_RANK, SIGN, Part
from common.planning.residual_fit import LEFT, Choice, Spectrum, sign_group

# Prices at which a residual's curve is known: powers of 2^(1/2) around the loss of one byte's
# share.
PRICES = 2.0 ** np.arange(-44, 12, 0.5)


# Curves that are computed together, for memory's sake.
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Kinds:
    """Which residuals may be used. bits: of low-rank components, none for no low rank."""

    bits: tuple[int, ...] = tuple(LEFT)
    sign: bool = True

    @property
    def any(self) -> bool:
        return self.sign or bool(self.bits)


@dataclass(frozen=True)
class Curve:
    """What residuals leave of a tenant's loss at a position, at each of `PRICES` (loss 1, so prices
    are relative).

    nbytes: float64 [prices], rising as prices fall. left: float64 [prices], 1 where nothing is
        kept.
    """

    nbytes: np.ndarray
    left: np.ndarray


@lru_cache(maxsize=256)
def _levels(
    shape: tuple[int, ...], bits: tuple[int, ...]
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of bits that a component is worth at some price, from few to many; the bytes of a
    component in each; what each keeps more of it than the one before; and the price at which it is
    worth that step, for a component of 1.

    The others lie below the upper hull of what is kept over bytes: small rows are padded, so that 2
    and 4 bits may take as many bytes.
    """
    hull: list[tuple[float, float, int]] = [(0.0, 0.0, 0)]
    for b in sorted(bits):
        cost, kept = float(Part("", LOW_RANK, b, 1).nbytes(shape)), 1 - LEFT[b]
        while len(hull) > 1 and (
            cost <= hull[-1][0]
            or (kept - hull[-1][1]) / (cost - hull[-1][0])
            >= (hull[-1][1] - hull[-2][1]) / (hull[-1][0] - hull[-2][0])
        ):
            hull.pop()
        hull.append((cost, kept, b))
    costs, more = np.array([h[0] for h in hull]), np.diff([h[1] for h in hull])
    return tuple(h[2] for h in hull[1:]), costs[1:], more, more / np.diff(costs)


@dataclass(frozen=True)
class _Points:
    """What is best for each of some matrices of one shape at each of `PRICES`.

    nbytes, gain: float64 [matrices, prices]. ranks: int [matrices, prices, levels], components in
        so many bits or
    more, see `_levels`. sign: bool [matrices, prices].
    """

    bits: tuple[int, ...]
    nbytes: np.ndarray
    gain: np.ndarray
    ranks: np.ndarray
    sign: np.ndarray

    def choice(self, matrix: int, price: int) -> Choice:
        more = [*self.ranks[matrix, price].tolist(), 0]
        counts = [(b, more[i] - more[i + 1]) for i, b in enumerate(self.bits)]
        return Choice(
            tuple((b, n) for b, n in reversed(counts) if n), bool(self.sign[matrix, price])
        )


def _points(spectra: Sequence[Spectrum], kinds: Kinds, itemsize: int) -> _Points:
    """itemsize: bytes of a number of the store's type; no residual may take more than the matrix
    itself.

    At every price nothing, signs, low rank, and low rank under signs are compared. How many
    components have how many bits follows from the price alone, as a component's gain is its squared
    singular value times what bits keep of it. Where that takes more than the matrix, it is as much
    as the lowest price above buys within it.
    """
    shape, prices, count = spectra[0].shape, len(PRICES), len(spectra)
    most = shape[0] * shape[1] * itemsize
    sign_bytes = float(_aligned(Part("", SIGN, 1, sign_group(shape)).nbytes(shape)))
    total, share = (
        np.array([getattr(s, name) for s in spectra])[:, None] for name in ("total", "sign")
    )
    zero = np.zeros((count, prices))
    options = [(zero, zero)]  # (bytes, gain), and below the ranks of each
    if kinds.sign:
        allowed = sign_bytes <= most
        options.append((zero + sign_bytes, zero + (share * total if allowed else -np.inf)))
    names, costs, more, step = _levels(shape, kinds.bits)
    ranks = [np.zeros((count, prices, len(names)), dtype=np.int32)] * len(options)
    for with_sign in ((False, True) if kinds.sign else (False,)) if names else ():
        found = np.empty((count, prices, len(names)), dtype=np.int32)
        low, limit = np.empty((count, prices)), PRICES[:, None] / step
        for i, s in enumerate(spectra):
            # Under signs, which remove a share of everything, a component gains less.
            factor = 1 - s.sign if with_sign else 1.0
            found[i] = np.searchsorted(-s.values * factor, -limit) if factor > 0 else 0
            low[i] = np.concatenate([[0.0], np.cumsum(s.values)])[found[i]] @ more
        each = found - np.concatenate([found[:, :, 1:], np.zeros_like(found[:, :, :1])], axis=2)
        nbytes = (-(-(each * costs) // ALIGNMENT) * ALIGNMENT).sum(axis=2)
        gain = low
        if with_sign:
            nbytes, gain = nbytes + sign_bytes, low + share * (total - low)
        # The lowest price from here on at which it fits; `prices` where it does at none.
        fits = np.where(nbytes <= most, np.arange(prices), prices)
        fits = np.minimum.accumulate(fits[:, ::-1], axis=1)[:, ::-1]
        at = np.minimum(fits, prices - 1)
        rows = np.arange(count)[:, None]
        options.append((nbytes[rows, at], np.where(fits < prices, gain[rows, at], -np.inf)))
        ranks.append(found[rows, at])
    value = np.stack([gain - PRICES * nbytes for nbytes, gain in options])
    best = value.argmax(axis=0)
    nbytes, gain = (np.choose(best, [o[i] for o in options]) for i in (0, 1))
    chosen = ranks[0]
    for i in range(1, len(ranks)):
        chosen = np.where((best == i)[:, :, None], ranks[i], chosen)
    return _Points(
        names, nbytes, gain, chosen, (best == 1) | (best == 3) if kinds.sign else best < 0
    )


def choose(spectra: Sequence[Spectrum], price: float, kinds: Kinds, itemsize: int) -> list[Choice]:
    """The best parts for each matrix when a byte costs `price`, one of `PRICES`, and the spectra's
    totals together are
    the loss. itemsize: bytes of a number of the store's type."""
    index = int(np.abs(np.log(PRICES / price)).argmin())
    return [_points([s], kinds, itemsize).choice(0, index) for s in spectra]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def curves(rows: Sequence[Sequence[Spectrum]], kinds: Kinds, itemsize: int) -> list[Curve]:
    """Of tenants at positions, all of the same shapes; the totals of a row's spectra together count
    as loss 1."""
    nothing = Curve(np.zeros(len(PRICES)), np.ones(len(PRICES)))
    totals = [sum(s.total for s in row) for row in rows]
    some = [i for i, total in enumerate(totals) if total > 0] if kinds.any else []
    found = [nothing] * len(rows)
    for start in range(0, len(some), ROWS_AT_ONCE):
        part = some[start : start + ROWS_AT_ONCE]
        nbytes, gain = (np.zeros((len(part), len(PRICES))) for _ in range(2))
        for column in zip(
            *([s.scaled(s.total / totals[i]) for s in rows[i]] for i in part), strict=True
        ):
            points = _points(column, kinds, itemsize)
            nbytes += points.nbytes
            gain += points.gain
        for i, b, g in zip(part, nbytes, gain, strict=True):
            found[i] = Curve(b, np.maximum(0.0, 1 - g))
    return found


def curve(spectra: Sequence[Spectrum], kinds: Kinds, itemsize: int) -> Curve:
    """Of one tenant at one position; the spectra's totals together count as loss 1."""
    return curves([spectra], kinds, itemsize)[0]


def lower_envelope(nbytes: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Makes every point of curves the best of all of its curve's points at its price, in place.

    nbytes, left: [..., prices + 1], the last point at an infinite price. Returns which point each
    now is. Points are best already where what a byte gains between neighbours lies between their
    prices; padding to whole words can shift it.
    """
    shape, count = nbytes.shape, len(PRICES)
    nbytes, left = nbytes.reshape(-1, count + 1), left.reshape(-1, count + 1)
    point = np.tile(np.arange(count + 1, dtype=np.uint8), (len(nbytes), 1))
    fewer, worse = nbytes[:, :-1] - nbytes[:, 1:], left[:, 1:] - left[:, :-1]
    limit = np.append(PRICES[1:], np.inf)
    with np.errstate(invalid="ignore"):  # no bytes at an infinite price
        good = (worse >= PRICES * fewer) & ((worse <= limit * fewer) | (fewer == 0))
        good &= (fewer > 0) | ((fewer == 0) & (worse == 0))
    for row in np.flatnonzero(~good.all(axis=1)):
        value = left[row] + PRICES[:, None] * nbytes[row]
        point[row, :-1] = value.argmin(axis=1)
        nbytes[row], left[row] = nbytes[row, point[row]], left[row, point[row]]
    return point.reshape(shape)
