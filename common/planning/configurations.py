"""The ways to keep copies of one position: whose, how many, and what each costs in quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

# Tenants up to which all subsets of owners are tried.
EXACT_TENANTS = 10


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
