"""Copies made from several tenants' experts of one position. Experts alone are merged; all else stays own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.experts import Matrices, forward, inner, inputs_and_output
from common.families import ExpertSpec

# How far fits may be held to the tenants' mixture, as shares of the mean diagonal of second moments.
RIDGES = (0.5, 0.2, 0.08, 0.03, 0.01, 0.003)


@dataclass(frozen=True)
class Sample:
    """Inputs of one tenant's expert. x: float32 [n, H]; weights: float64 [n], what an error on each of them costs."""

    x: np.ndarray
    weights: np.ndarray


def mixture(mix: np.ndarray, own: Mapping[int, Matrices]) -> dict[str, np.ndarray]:
    """A weighted sum of tenants' experts. mix: [tenants]. Returns float64 [out, in] of each projection."""
    used = [int(t) for t in np.flatnonzero(mix)]
    return {
        name: np.asarray(sum(np.float64(mix[t]) * own[t][name].astype(np.float64) for t in used))
        for name in own[used[0]]
    }


def fit_matrix(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    towards: np.ndarray,
    ridge: float,
) -> np.ndarray:
    """W [out, in] with the least `sum_i w_i |W x_i - y_i|^2 + ridge |W - towards|^2`, rows i of all tenants.

    Solved for what is to be added to `towards`, in the smaller of the spaces of samples and of inputs.
    """
    x = np.concatenate(inputs).astype(np.float64)
    every = np.concatenate(weights)
    root = np.sqrt(every / max(float(every.mean()), 1e-300))[:, None]  # only what they are to each other counts
    wanted = (np.concatenate(targets).astype(np.float64) - x @ towards.T) * root
    x *= root
    held = ridge * float((x**2).sum()) / x.shape[1] + 1e-12
    if len(x) < x.shape[1]:
        return np.asarray(towards + (x.T @ np.linalg.solve(x @ x.T + held * np.eye(len(x)), wanted)).T)
    return np.asarray(towards + np.linalg.solve(x.T @ x + held * np.eye(x.shape[1]), x.T @ wanted).T)


def least_squares(
    spec: ExpertSpec,
    own: Mapping[int, Matrices],
    samples: Mapping[int, Sample],
    mix: np.ndarray,
    ridge: float,
    added: Mapping[int, Matrices] | None = None,
) -> dict[str, np.ndarray]:
    """One expert whose outputs are close to each tenant's own on that tenant's inputs: float64 [out, in].

    The projections that read the input are fitted to the tenants' (RegMean, arXiv 2212.09849); the last one is fitted
    to the tenants' outputs on what the fitted ones hand it, so it also mends their errors, where RegMean fits it to
    the tenants' own on their own hidden values. What samples do not determine is as in the mixture. For the tenants of
    `samples` only. added: what residuals will add to some projections of the copy for some tenants.
    """
    first, last = inputs_and_output(spec)
    added = added or {}
    start = mixture(mix, own)
    tenants = [t for t, s in samples.items() if len(s.x)]
    if not tenants:
        return start
    weights = [samples[t].weights for t in tenants]

    def beside(t: int, name: str) -> np.ndarray | float:
        return added.get(t, {}).get(name, 0.0)

    found = {
        name: fit_matrix(
            [samples[t].x for t in tenants],
            [samples[t].x @ (own[t][name] - beside(t, name)).T for t in tenants],
            weights,
            start[name],
            ridge,
        )
        for name in first
    }
    hidden = [
        inner(spec, samples[t].x, {name: (found[name] + beside(t, name)).astype(np.float32) for name in first})
        for t in tenants
    ]
    outputs = [forward(spec, samples[t].x, own[t]) for t in tenants]
    for number, t in enumerate(tenants):
        if last in added.get(t, {}):
            outputs[number] = outputs[number] - hidden[number] @ added[t][last].T
    found[last] = fit_matrix(hidden, outputs, weights, start[last], ridge)
    return found


def best_ridge(
    spec: ExpertSpec, positions: Sequence[tuple[Mapping[int, Matrices], Mapping[int, Sample], np.ndarray]]
) -> float:
    """The one of `RIDGES` whose fits to every second sample leave the least error on the others.

    positions: (own, samples, mix) of a few, as `least_squares` takes them.
    """
    totals = np.zeros(len(RIDGES))
    for own, samples, mix in positions:
        halves = [{t: Sample(s.x[i::2], s.weights[i::2]) for t, s in samples.items()} for i in (0, 1)]
        outputs = [{t: forward(spec, s.x, own[t]) for t, s in half.items() if len(s.x)} for half in halves]
        for number, ridge in enumerate(RIDGES):
            for seen, unseen, expected in ((0, 1, outputs[1]), (1, 0, outputs[0])):
                fitted = least_squares(spec, own, halves[seen], mix, ridge)
                weights = {name: m.astype(np.float32) for name, m in fitted.items()}
                for t, wanted in expected.items():
                    error = (forward(spec, halves[unseen][t].x, weights) - wanted) ** 2
                    totals[number] += float(halves[unseen][t].weights @ error.sum(axis=1))
    return RIDGES[int(totals.argmin())]
