"""Random products of differences, shares of the traffic and spectra for tests of planning."""

from __future__ import annotations

import numpy as np

from common.planning.residual_fit import Spectrum


def grams(seed: int, count: int, size: int = 6, samples: int = 12) -> np.ndarray:
    """Q_t of `count` tenants, [T, T, T]: from random outputs of each on the inputs of each."""
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((count, count, samples * size)) * rng.uniform(
        0.2, 2, (1, count, 1)
    )
    found = np.empty((count, count, count))
    for t in range(count):
        error = outputs[t] - outputs[t, t]
        found[t] = error @ error.T
    return found


def shares(seed: int, count: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).uniform(0.05, 1, count)
    return np.asarray(drawn / drawn.sum())


SHAPES = [(24, 16), (16, 24), (64, 128)]


def spectra(seed: int, shapes: list[tuple[int, int]]) -> list[Spectrum]:
    rng = np.random.default_rng(seed)
    found = []
    for shape in shapes:
        values = np.sort(rng.exponential(size=min(shape)) ** rng.uniform(1, 6))[::-1]
        total = float(values.sum()) * float(rng.uniform(1, 1.3))
        found.append(Spectrum(shape, values, total, float(rng.uniform(0.2, 0.7))))
    return found
