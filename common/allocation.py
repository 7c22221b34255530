"""Where memory goes: how many copies of each position, whose or of what mixture, and which tenants
keep residuals.

Every position has configurations (one copy, two, ... one for each tenant) with a loss for each
tenant, and beside each
copy every tenant has a curve: how much of its loss is left for how many bytes of residual. At a
price of mu loss a byte each position has a best choice of its own, found by looking at all of its
configurations; mu is then lowered, by bisection, until the budget is used. This is Lagrangian
relaxation of a multiple-choice knapsack: what it finds is the best of all plans with as many bytes,
and what another plan could gain with the bytes that are left over is at most mu times these
(Everett 1963, theorem 1; bounds are given in `Allocation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from common.errors import PlanError
from common.fitting import LEFT, Choice, Spectrum, sign_group
from common.residuals import ALIGNMENT, LOW_RANK, SIGN, Part

# Tenants up to which all subsets of owners are tried.
EXACT_TENANTS = 10
# Prices at which a residual's curve is known: powers of 2^(1/2) around the loss of one byte's
# share.
PRICES = 2.0 ** np.arange(-44, 12, 0.5)
# Curves that are computed together, for memory's sake.
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Config:
    """Copies of one position.

    mixes: float64 [copies, tenants], each a copy's weights of tenants (one 1: that tenant's own).
    serves: int [tenants], index into them. losses: float64 [tenants]. curve: which set of residual
        curves.
    fitted: whether copies of several tenants are fitted to their outputs, starting from the
        mixture.
    """

    mixes: np.ndarray
    serves: np.ndarray
    losses: np.ndarray
    curve: int = 0
    fitted: bool = False


def owned_configs(gram: np.ndarray, traffic: np.ndarray, most: int) -> list[Config]:
    """Best sets of 1, 2, ... `most` of the tenants' own copies at one position.

    gram: float64 [T, T, T], see `Losses.gram`. All subsets are tried for up to 10 tenants; for
    more, copies are taken away one by one, each time the one that is missed least, and exchanged as
    long as that helps.
    """
    count = len(traffic)
    single = np.einsum("tcc->tc", gram)  # loss of t with c's copy
    weighted = single * traffic[:, None]
    found = []
    if count <= EXACT_TENANTS:
        for k in range(1, most + 1):
            subsets = np.array(list(combinations(range(count), k)))
            best = subsets[weighted[:, subsets].min(axis=2).sum(axis=0).argmin()]
            found.append(_owned(best, single))
        return found
    kept = list(range(count))
    while kept:
        if len(kept) <= most:
            kept = _exchanged(kept, weighted)
            found.append(_owned(np.array(kept), single))
        if len(kept) == 1:
            break
        without = [weighted[:, [c for c in kept if c != out]].min(axis=1).sum() for out in kept]
        kept.pop(int(np.argmin(without)))
    return found[::-1]


def _exchanged(kept: list[int], weighted: np.ndarray) -> list[int]:
    best = float(weighted[:, kept].min(axis=1).sum())
    for i in range(len(kept)):
        for c in range(weighted.shape[1]):
            trial = [*kept[:i], c, *kept[i + 1 :]]
            value = float(weighted[:, trial].min(axis=1).sum())
            if c not in kept and value < best * (1 - 1e-9):
                kept, best = trial, value
    return kept


def _owned(owners: np.ndarray, single: np.ndarray) -> Config:
    serves = single[:, owners].argmin(axis=1)
    losses = single[:, owners].min(axis=1)
    return Config(np.eye(single.shape[0])[owners], serves, losses, curve=1)


def best_mix(
    gram: np.ndarray, members: Sequence[int], traffic: np.ndarray
) -> tuple[np.ndarray, float]:
    """Weights [T] of members that serve these members with the least loss, and that loss.

    The least of `w^T A w` with `sum w = 1`, A the members' grams weighted by traffic, is `A^-1 1 /
    (1^T A^-1 1)`. Members with a negative weight are left out of the mixture one by one, so that no
    noise is amplified.
    """
    return _mix_of(np.tensordot(traffic[list(members)], gram[list(members)], axes=1), members)


def _mix_of(whole: np.ndarray, members: Sequence[int]) -> tuple[np.ndarray, float]:
    """The same for the sum of the members' grams, weighted by traffic: [T, T]."""
    used = list(members)
    while True:
        a = whole[used][:, used]
        ridge = 1e-4 * np.trace(a) / len(used) + 1e-30
        if len(used) == 2:  # most of what merging tries; a solver's call takes many times as long
            solved = np.array([a[1, 1] + ridge - a[0, 1], a[0, 0] + ridge - a[0, 1]])
        else:
            solved = np.linalg.solve(a + ridge * np.eye(len(used)), np.ones(len(used)))
        weights = solved / solved.sum()
        if weights.min() >= 0 or len(used) == 1:
            break
        used.pop(int(weights.argmin()))
    mix = np.zeros(len(whole))
    mix[used] = weights
    return mix, float(mix @ whole @ mix)


def merged_configs(gram: np.ndarray, traffic: np.ndarray, most: int) -> list[Config]:
    """Mixtures for 1, 2, ... `most` groups of tenants: neighbours joined one pair at a time
    (agglomerative clustering), each time the pair whose common mixture costs least (Ward 1963, with
    the loss for a distance)."""
    count = len(traffic)
    groups: list[tuple[int, ...]] = [(t,) for t in range(count)]
    sums: dict[tuple[int, ...], np.ndarray] = {(t,): traffic[t] * gram[t] for t in range(count)}
    mixes: dict[tuple[int, ...], tuple[np.ndarray, float]] = {
        (t,): (np.eye(count)[t], 0.0) for t in range(count)
    }
    found = []
    while True:
        if len(groups) <= most:
            found.append(_merged([mixes[g][0] for g in groups], groups, gram))
        if len(groups) == 1:
            return found[::-1]
        best: tuple[float, int, int] | None = None
        for i, j in combinations(range(len(groups)), 2):
            union = groups[i] + groups[j]
            if union not in mixes:
                mixes[union] = _mix_of(sums[groups[i]] + sums[groups[j]], union)
            added = mixes[union][1] - mixes[groups[i]][1] - mixes[groups[j]][1]
            if best is None or added < best[0]:
                best = (added, i, j)
        assert best is not None
        _, i, j = best
        union = groups[i] + groups[j]
        sums[union] = sums[groups[i]] + sums[groups[j]]
        groups = [g for n, g in enumerate(groups) if n not in (i, j)] + [union]


def _merged(mixes: list[np.ndarray], groups: Sequence[tuple[int, ...]], gram: np.ndarray) -> Config:
    serves = np.zeros(len(gram), dtype=np.int64)
    for number, group in enumerate(groups):
        serves[list(group)] = number
    stacked = np.stack(mixes)
    losses = np.array(
        [max(0.0, float(stacked[s] @ gram[t] @ stacked[s])) for t, s in enumerate(serves)]
    )
    return Config(stacked, serves, losses)


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


@dataclass(frozen=True)
class Allocation:
    """chosen: int [positions], which configuration. price: float64 [positions, tenants], at which
    each residual is chosen (relative to its loss; infinite: none).

    losses: float64 [positions, tenants], predicted; nbytes: copies and residuals; bound: no plan of
    these configurations and curves within the budget has less (traffic-weighted) loss than this.
    """

    chosen: np.ndarray
    price: np.ndarray
    losses: np.ndarray
    nbytes: int
    bound: float


class Allocator:
    """Prices configurations and residuals of all positions.

    configs: of each position. curves: sets of [positions][tenants], as configs name them; None:
    without residuals. traffic: float64 [tenants].
    """

    def __init__(
        self,
        configs: Sequence[Sequence[Config]],
        curves: Sequence[Sequence[Sequence[Curve]]] | None,
        traffic: np.ndarray,
        copy_bytes: int,
    ):
        self._traffic = traffic
        # Positions may have fewer than others (nothing is fitted where nobody has samples): their
        # first one stands in, and as the first of equals is taken, its repetitions never are.
        most = max(map(len, configs))
        configs = [[*row, *[row[0]] * (most - len(row))] for row in configs]
        self._losses = np.array(
            [[c.losses for c in row] for row in configs]
        )  # [positions, configs, tenants]
        self._counts = np.array([[len(c.mixes) for c in row] for row in configs])
        self._base = self._counts * float(copy_bytes)
        self._set = np.array([[c.curve for c in row] for row in configs])
        self._curves = None
        self._point = np.zeros(0)
        if curves is not None:
            # [sets, positions, tenants, prices + 1], the last one for: no residual.
            nbytes, left = (
                np.array(
                    [
                        [[np.append(getattr(c, name), end) for c in row] for row in one]
                        for one in curves
                    ]
                )
                for name, end in (("nbytes", 0.0), ("left", 1.0))
            )
            self._point = _lower_envelope(nbytes, left)
            self._curves = nbytes, left

    def at(self, mu: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        """Best choice at a price: chosen [positions], price index [positions, tenants], losses
        [positions, tenants], bytes [positions], and the Lagrangian's value without the budget's
        term."""
        weighted = self._losses * self._traffic
        if self._curves is None:
            index = np.full(self._losses.shape, len(PRICES))
            nbytes, left = np.zeros(self._losses.shape), self._losses
        else:
            with np.errstate(divide="ignore", over="ignore"):
                relative = np.where(weighted > 0, mu / np.maximum(weighted, 1e-300), np.inf)
            # Of a curve's points one of the two with the nearest prices is best.
            above = np.searchsorted(PRICES, relative)
            sets = self._set[:, :, None]
            places = (
                np.arange(len(weighted))[:, None, None],
                np.arange(weighted.shape[2])[None, None],
            )
            nearest = []
            for point in (above, np.maximum(above - 1, 0)):
                nbytes = self._curves[0][sets, *places, point]
                left = self._curves[1][sets, *places, point] * self._losses
                nearest.append((nbytes, left, left * self._traffic + mu * nbytes))
            lower = nearest[1][2] < nearest[0][2]
            index = self._point[sets, *places, np.where(lower, np.maximum(above - 1, 0), above)]
            nbytes, left = (
                np.where(lower, b, a) for a, b in zip(nearest[0][:2], nearest[1][:2], strict=True)
            )
        value = (left * self._traffic).sum(axis=2) + mu * (self._base + nbytes.sum(axis=2))
        chosen = value.argmin(axis=1)
        rows = np.arange(len(chosen))
        total = self._base[rows, chosen] + nbytes[rows, chosen].sum(axis=1)
        return (
            chosen,
            index[rows, chosen],
            left[rows, chosen],
            total,
            float(value[rows, chosen].sum()),
        )

    def copies(self, allocation: Allocation) -> list[int]:
        """Number of copies of each position in an allocation."""
        return [int(n) for n in self._counts[np.arange(len(self._counts)), allocation.chosen]]

    def allocate(self, budget: int) -> Allocation:
        """The best use of `budget` bytes for copies and residuals.

        Raises PlanError if one copy a position does not fit.
        """
        least = int(self._base.min(axis=1).sum())
        if budget < least:
            raise PlanError(
                f"{budget} bytes are less than one copy of each position takes ({least})"
            )
        low, high = 1e-30, 1e30  # too dear at high, over the budget at low
        if self.at(low)[3].sum() <= budget:
            high = low
        else:
            for _ in range(200):
                middle = float(np.sqrt(low * high))
                if self.at(middle)[3].sum() <= budget:
                    high = middle
                else:
                    low = middle
                if high / low < 1 + 1e-9:
                    break
        chosen, index, losses, nbytes, value = self.at(high)
        bound = max(0.0, value - high * budget)
        # Bytes that are left go, position by position, to what the next lower price would buy: in
        # order of gain a byte as far as they reach, then to the one that still fits and gains most.
        # So more bytes never gain less.
        after = self.at(min(low, high / 2**0.5))
        gain = ((losses - after[2]) * self._traffic).sum(axis=1)
        more = after[3] - nbytes
        order = np.argsort(-gain / np.maximum(more, 1e-9), kind="stable")
        order = order[gain[order] > 0]
        spare = budget - nbytes.sum()
        reached = int(np.searchsorted(np.cumsum(np.maximum(more[order], 0)), spare, side="right"))
        taken, rest = order[:reached], order[reached:]
        rest = rest[more[rest] <= spare - np.maximum(more[taken], 0).sum()]
        if len(rest):
            taken = np.append(taken, rest[gain[rest].argmax()])
        for mine, theirs in zip((chosen, index, losses, nbytes), after[:4], strict=True):
            mine[taken] = theirs[taken]
        prices = np.append(PRICES, np.inf)[index]
        return Allocation(chosen, prices, losses, int(nbytes.sum()), bound)


def _lower_envelope(nbytes: np.ndarray, left: np.ndarray) -> np.ndarray:
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
