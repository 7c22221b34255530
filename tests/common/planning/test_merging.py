"""How far fitted copies are held to mixtures: chosen on samples that a fit has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from common.families import ExpertSpec
from common.plan.expert_math import forward
from common.planning.merging import RIDGES, Sample, best_ridge, least_squares, mixture

SPEC = ExpertSpec("test", ("0",), 1, 12, 20, "relu", 1, (("up", (20, 12)), ("down", (12, 20))))
MIX = np.array([0.5, 0.5])


def experts(seed: int, apart: float) -> dict[int, dict[str, np.ndarray]]:
    """Two tenants' experts, so far from what they have in common."""
    rng = np.random.default_rng(seed)
    shared = {n: rng.standard_normal(s) / s[1] ** 0.5 for n, s in SPEC.projections}
    moved = {n: rng.standard_normal(s) / s[1] ** 0.5 for n, s in SPEC.projections}
    return {
        t: {n: (shared[n] + sign * apart * moved[n]).astype(np.float32) for n in shared}
        for t, sign in ((0, 1), (1, -1))
    }


def samples(seed: int, count: int) -> dict[int, Sample]:
    """Inputs of each tenant, in a part of the space of its own."""
    rng = np.random.default_rng(seed)
    found = {}
    for t in (0, 1):
        x = rng.standard_normal((count, 12)) * (0.3 + 2 * (np.arange(12) % 2 == t))
        found[t] = Sample(x.astype(np.float32), rng.uniform(0.1, 1, count))
    return found


def held_out_error(
    ridge: float, own: dict[int, dict[str, np.ndarray]], seen: dict[int, Sample]
) -> float:
    fitted = {
        n: m.astype(np.float32) for n, m in least_squares(SPEC, own, seen, MIX, ridge).items()
    }
    return sum(
        float(
            s.weights @ ((forward(SPEC, s.x, fitted) - forward(SPEC, s.x, own[t])) ** 2).sum(axis=1)
        )
        for t, s in samples(99, 2000).items()
    )


@pytest.mark.parametrize(("count", "apart"), [(16, 0.3), (60, 0.3), (600, 0.3), (600, 0.05)])
def test_the_ridge_suits_inputs_that_were_not_seen(count: int, apart: float) -> None:
    own, seen = experts(0, apart), samples(1, count)
    found = best_ridge(SPEC, [(own, seen, MIX)])
    errors = [held_out_error(ridge, own, seen) for ridge in RIDGES]
    assert errors[RIDGES.index(found)] < 1.25 * min(errors)
    # And it is worth fitting: the mixture alone leaves more.
    assert errors[RIDGES.index(found)] < held_out_error(1e9, own, seen)


def test_without_samples_a_fit_is_the_mixture() -> None:
    own = experts(0, 0.3)
    empty = {t: Sample(np.zeros((0, 12), np.float32), np.zeros(0)) for t in (0, 1)}
    for name, matrix in least_squares(SPEC, own, empty, MIX, 0.1).items():
        np.testing.assert_array_equal(matrix, mixture(MIX, own)[name])
