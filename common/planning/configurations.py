"""The candidates for the copy of one position, and what each costs the tenants that it serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Config:
    """One copy of a position, which serves all tenants.

    mix: float64 [tenants], the copy's weights of tenants (a single 1: that tenant's own).
    losses: float64 [tenants]. curve: number of the set of residual curves that belongs to it.
    fitted: whether the copy is fitted to all tenants' outputs, starting from the mixture.
    """

    mix: np.ndarray
    losses: np.ndarray
    curve: int = 0
    fitted: bool = False


def owned(gram: np.ndarray, traffic: np.ndarray) -> Config:
    """The tenant's own copy that serves all with the least loss.

    gram: float64 [T, T, T], see `Losses.gram`. traffic: float64 [T].
    """
    single = np.einsum("tcc->tc", gram)  # loss of t with c's copy
    owner = int((traffic @ single).argmin())
    return Config(np.eye(len(traffic))[owner], single[:, owner], curve=1)


def mean(gram: np.ndarray) -> Config:
    """The plain mean of all tenants' experts."""
    count = len(gram)
    return _mixed(np.full(count, 1 / count), gram)


def merged(gram: np.ndarray, traffic: np.ndarray) -> Config:
    """The mixture that serves all tenants with the least loss."""
    return _mixed(best_mix(np.tensordot(traffic, gram, axes=1)), gram)


def best_mix(whole: np.ndarray) -> np.ndarray:
    """Weights [T] that are not negative, sum to 1 and have the least `w^T A w`.

    whole: A, the tenants' grams weighted by traffic, float64 [T, T]. The least is at `A^-1 1 / (1^T
    A^-1 1)`. Tenants with a negative weight are left out one by one, so that no noise is amplified.
    """
    used = list(range(len(whole)))
    while True:
        a = whole[used][:, used]
        ridge = 1e-4 * np.trace(a) / len(used) + 1e-30
        solved = np.linalg.solve(a + ridge * np.eye(len(used)), np.ones(len(used)))
        weights = solved / solved.sum()
        if weights.min() >= 0 or len(used) == 1:
            break
        used.pop(int(weights.argmin()))
    mix = np.zeros(len(whole))
    mix[used] = weights
    return mix


def _mixed(mix: np.ndarray, gram: np.ndarray) -> Config:
    losses = np.maximum(0, np.einsum("c,tcd,d->t", mix, gram, mix))
    return Config(mix, losses)
