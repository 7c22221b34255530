"""Where memory goes: how many copies of each position, whose or of what mixture, and which tenants keep residuals.

Every position has configurations (one copy, two, ... one for each tenant) with a loss for each tenant, and beside each
copy every tenant has a curve: how much of its loss is left for how many bytes of residual. At a price of mu loss a
byte each position has a best choice of its own, found by looking at all of its configurations; mu is then lowered, by
bisection, until the budget is used. This is Lagrangian relaxation of a multiple-choice knapsack: what it finds is the
best of all plans with as many bytes, and what another plan could gain with the bytes that are left over is at most mu
times these (Everett 1963, theorem 1; bounds are given in `Allocation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from common.fitting import LEFT, Choice, Spectrum, bits_of, sign_group
from common.residuals import ALIGNMENT, LOW_RANK, SIGN, Part

# Tenants up to which all subsets of owners are tried.
EXACT_TENANTS = 10
# Prices at which a residual's curve is known: powers of 2^(1/2) around the loss of one byte's share.
PRICES = 2.0 ** np.arange(-44, 12, 0.5)


@dataclass(frozen=True)
class Config:
    """Copies of one position.

    mixes: float64 [copies, tenants], each a copy's weights of tenants (one 1: that tenant's own).
    serves: int [tenants], index into them. losses: float64 [tenants]. curve: which set of residual curves.
    fitted: whether copies of several tenants are fitted to their outputs, starting from the mixture.
    """

    mixes: np.ndarray
    serves: np.ndarray
    losses: np.ndarray
    curve: int = 0
    fitted: bool = False


def owned_configs(gram: np.ndarray, traffic: np.ndarray, most: int) -> list[Config]:
    """Best sets of 1, 2, ... `most` of the tenants' own copies at one position.

    gram: float64 [T, T, T], see `Losses.gram`. All subsets are tried for up to 10 tenants; for more, copies are taken
    away one by one, each time the one that is missed least, and exchanged as long as that helps.
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


def best_mix(gram: np.ndarray, members: Sequence[int], traffic: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [T] of members that serve these members with the least loss, and that loss.

    The least of `w^T A w` with `sum w = 1`, A the members' grams weighted by traffic, is `A^-1 1 / (1^T A^-1 1)`.
    Members with a negative weight are left out of the mixture one by one, so that no noise is amplified.
    """
    size = len(traffic)
    used = list(members)
    whole = np.tensordot(traffic[list(members)], gram[list(members)], axes=1)
    while True:
        a = whole[np.ix_(used, used)]
        ridge = 1e-4 * np.trace(a) / len(used) + 1e-30
        solved = np.linalg.solve(a + ridge * np.eye(len(used)), np.ones(len(used)))
        weights = solved / solved.sum()
        if weights.min() >= 0 or len(used) == 1:
            break
        used.pop(int(weights.argmin()))
    mix = np.zeros(size)
    mix[used] = weights
    return mix, float(mix @ whole @ mix)


def merged_configs(gram: np.ndarray, traffic: np.ndarray, most: int) -> list[Config]:
    """Mixtures for 1, 2, ... `most` groups of tenants: neighbours joined one pair at a time (agglomerative clustering),
    each time the pair whose common mixture costs least (Ward 1963, with the loss for a distance)."""
    count = len(traffic)
    groups: list[tuple[int, ...]] = [(t,) for t in range(count)]
    mixes: dict[tuple[int, ...], tuple[np.ndarray, float]] = {(t,): (np.eye(count)[t], 0.0) for t in range(count)}
    found = []
    while True:
        if len(groups) <= most:
            found.append(_merged([mixes[g][0] for g in groups], groups, gram))
        if len(groups) == 1:
            return found[::-1]
        best: tuple[float, int, int] | None = None
        for i, j in combinations(range(len(groups)), 2):
            union = tuple(sorted(groups[i] + groups[j]))
            if union not in mixes:
                mixes[union] = best_mix(gram, union, traffic)
            added = mixes[union][1] - mixes[groups[i]][1] - mixes[groups[j]][1]
            if best is None or added < best[0]:
                best = (added, i, j)
        assert best is not None
        _, i, j = best
        union = tuple(sorted(groups[i] + groups[j]))
        groups = [g for n, g in enumerate(groups) if n not in (i, j)] + [union]


def _merged(mixes: list[np.ndarray], groups: Sequence[tuple[int, ...]], gram: np.ndarray) -> Config:
    serves = np.zeros(len(gram), dtype=np.int64)
    for number, group in enumerate(groups):
        serves[list(group)] = number
    stacked = np.stack(mixes)
    losses = np.array([max(0.0, float(stacked[s] @ gram[t] @ stacked[s])) for t, s in enumerate(serves)])
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
    """What residuals leave of a tenant's loss at a position, at each of `PRICES` (loss 1, so prices are relative).

    nbytes: float64 [prices], rising as prices fall. left: float64 [prices], 1 where nothing is kept.
    """

    nbytes: np.ndarray
    left: np.ndarray


def choose(spectra: Sequence[Spectrum], price: float, kinds: Kinds, itemsize: int) -> list[Choice]:
    """The best parts for each matrix when a byte costs `price` and the spectra's totals together are the loss.

    itemsize: bytes of a number of the store's type; no residual may take more than the matrix itself.
    """
    return [_choose_one(s, price, kinds, itemsize)[0] for s in spectra]


def _choose_one(s: Spectrum, price: float, kinds: Kinds, itemsize: int) -> tuple[Choice, float, float]:
    """The choice, its bytes and its gain."""
    options = [(Choice(), 0.0, 0.0)]
    sign_bytes = float(_aligned(Part("", SIGN, 1, sign_group(s.shape)).nbytes(s.shape)))
    if kinds.sign:
        options.append((Choice(sign=True), sign_bytes, s.sign * s.total))
    if kinds.bits:
        bits = np.array((0, *kinds.bits))
        cost = np.array([0.0, *(float(Part("", LOW_RANK, b, 1).nbytes(s.shape)) for b in kinds.bits)])
        kept = np.array([0.0, *(1 - LEFT[b] for b in kinds.bits)])
        for with_sign in (False, True) if kinds.sign else (False,):
            # Under signs, which remove a share of everything, a component gains less.
            gain = s.values[:, None] * (kept - s.sign * (kept if with_sign else 0))
            index = (gain - price * cost).argmax(axis=1)
            codes = [int(b) for b in bits[index]]
            ranks = bits_of(codes)
            if not ranks:
                continue
            nbytes = sum(float(_aligned(Part("", LOW_RANK, b, r).nbytes(s.shape))) for b, r in ranks)
            low = float((s.values * kept[index]).sum())
            if with_sign:
                options.append((Choice(ranks, True), nbytes + sign_bytes, low + s.sign * (s.total - low)))
            else:
                options.append((Choice(ranks), nbytes, low))
    most = s.shape[0] * s.shape[1] * itemsize
    allowed = [o for o in options if o[1] <= most]
    return max(allowed, key=lambda o: o[2] - price * o[1])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def curve(spectra: Sequence[Spectrum], kinds: Kinds, itemsize: int) -> Curve:
    """Of one tenant at one position; the spectra's totals together count as loss 1."""
    total = sum(s.total for s in spectra)
    nbytes, left = np.zeros(len(PRICES)), np.ones(len(PRICES))
    if total <= 0 or not kinds.any:
        return Curve(nbytes, left)
    scaled = [s.scaled(s.total / total) for s in spectra]
    for i, price in enumerate(PRICES):
        found = [_choose_one(s, float(price), kinds, itemsize) for s in scaled]
        nbytes[i] = sum(f[1] for f in found)
        left[i] = max(0.0, 1 - sum(f[2] for f in found))
    return Curve(nbytes, left)


@dataclass(frozen=True)
class Allocation:
    """chosen: int [positions], which configuration. price: float64 [positions, tenants], at which each residual is
    chosen (relative to its loss; infinite: none).

    losses: float64 [positions, tenants], predicted; nbytes: copies and residuals; bound: no plan of these
    configurations and curves within the budget has less (traffic-weighted) loss than this.
    """

    chosen: np.ndarray
    price: np.ndarray
    losses: np.ndarray
    nbytes: int
    bound: float


class Allocator:
    """Prices configurations and residuals of all positions.

    configs: of each position, of equal number. curves: sets of [positions][tenants], as configs name them; None:
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
        self._losses = np.array([[c.losses for c in row] for row in configs])  # [positions, configs, tenants]
        self._counts = np.array([[len(c.mixes) for c in row] for row in configs])
        self._base = self._counts * float(copy_bytes)
        self._set = np.array([[c.curve for c in row] for row in configs])
        self._curves = None
        if curves is not None:
            # [sets, positions, tenants, prices + 1], the last one for: no residual.
            nothing = np.zeros(1), np.ones(1)
            self._curves = tuple(
                np.array([[[np.concatenate([getattr(c, name), end]) for c in row] for row in one] for one in curves])
                for name, end in zip(("nbytes", "left"), nothing, strict=True)
            )

    def at(self, mu: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        """Best choice at a price: chosen [positions], price index [positions, tenants], losses [positions, tenants],
        bytes [positions], and the Lagrangian's value without the budget's term."""
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
            places = np.arange(len(weighted))[:, None, None], np.arange(weighted.shape[2])[None, None]
            nearest = []
            for point in (above, np.maximum(above - 1, 0)):
                nbytes = self._curves[0][sets, *places, point]
                left = self._curves[1][sets, *places, point] * self._losses
                nearest.append((nbytes, left, left * self._traffic + mu * nbytes))
            lower = nearest[1][2] < nearest[0][2]
            index = np.where(lower, np.maximum(above - 1, 0), above)
            nbytes, left = (np.where(lower, b, a) for a, b in zip(nearest[0][:2], nearest[1][:2], strict=True))
        value = (left * self._traffic).sum(axis=2) + mu * (self._base + nbytes.sum(axis=2))
        chosen = value.argmin(axis=1)
        rows = np.arange(len(chosen))
        total = self._base[rows, chosen] + nbytes[rows, chosen].sum(axis=1)
        return chosen, index[rows, chosen], left[rows, chosen], total, float(value[rows, chosen].sum())

    def copies(self, allocation: Allocation) -> list[int]:
        """Number of copies of each position in an allocation."""
        return [int(n) for n in self._counts[np.arange(len(self._counts)), allocation.chosen]]

    def allocate(self, budget: int) -> Allocation:
        """The best use of `budget` bytes for copies and residuals; at least one copy a position must fit."""
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
        # Bytes that are left go, position by position, to what the next lower price would buy.
        spare = budget - nbytes.sum()
        after = self.at(min(low, high / 2**0.5))
        gain = ((losses - after[2]) * self._traffic).sum(axis=1)
        more = after[3] - nbytes
        for p in np.argsort(-gain / np.maximum(more, 1e-9)):
            if gain[p] > 0 and more[p] <= spare:
                chosen[p], index[p], losses[p], nbytes[p] = (part[p] for part in after[:4])
                spare -= more[p]
        prices = np.concatenate([PRICES, [np.inf]])[index]
        return Allocation(chosen, prices, losses, int(nbytes.sum()), bound)
