"""Copies made from several tenants' experts of one position. Experts alone are merged; all else
stays own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.dtypes import working
from common.families import ExpertSpec
from common.plan.expert_math import Matrices, forward, inner, inner_of, inputs_and_output, plus

# How far fits may be held to the tenants' mixture, as shares of the mean diagonal of second
# moments.
RIDGES = (2.0, 0.5, 0.2, 0.08, 0.03, 0.01, 0.003)


@dataclass(frozen=True)
class Sample:
    """Inputs of one tenant's expert. x: float32 [n, H]; weights: float64 [n], what an error on each
    of them costs."""

    x: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Targets:
    """What one tenant's own expert makes of its sample: float32 [n, out] before the activation, by
    projection, and float32 [n, H] at the end. Every fit needs them, so they are computed once."""

    before: Mapping[str, np.ndarray]
    output: np.ndarray

    @classmethod
    def of(cls, spec: ExpertSpec, x: np.ndarray, own: Matrices) -> Targets:
        first, last = inputs_and_output(spec)
        before = {name: x @ own[name].T for name in first}
        return cls(before, inner_of(spec, before) @ own[last].T)

    def of_rows(self, rows: slice | np.ndarray) -> Targets:
        return Targets({name: m[rows] for name, m in self.before.items()}, self.output[rows])


def mixture(mix: np.ndarray, own: Mapping[int, Matrices]) -> dict[str, np.ndarray]:
    """A weighted sum of tenants' experts. mix: [tenants]. Returns [out, in] of each projection, in
    `working` type."""
    used = [int(t) for t in np.flatnonzero(mix)]
    found = {}
    for name, matrix in own[used[0]].items():
        dtype = working(matrix.size)
        found[name] = dtype.type(mix[used[0]]) * matrix.astype(dtype, copy=False)
        for t in used[1:]:
            found[name] += dtype.type(mix[t]) * own[t][name].astype(dtype, copy=False)
    return found


def fit_matrix(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    towards: np.ndarray,
    ridge: float,
) -> np.ndarray:
    """W [out, in] with the least `sum_i w_i |W x_i - y_i|^2 + ridge |W - towards|^2`, rows i of all
    tenants.

    Solved for what is to be added to `towards`, in the smaller of the spaces of samples and of
    inputs. W has the type of `towards`; equations are solved in double precision whatever that is.
    """
    dtype = towards.dtype
    x = np.concatenate(inputs).astype(dtype)
    every = np.concatenate(weights)
    root = np.sqrt(every / max(float(every.mean()), 1e-300))[:, None].astype(
        dtype
    )  # only their ratios count
    wanted = (np.concatenate(targets).astype(dtype, copy=False) - x @ towards.T) * root
    x *= root
    held = ridge * float((x**2).sum(dtype=np.float64)) / x.shape[1] + 1e-12
    if len(x) < x.shape[1]:
        products = (x @ x.T).astype(np.float64, copy=False)
        solved = np.linalg.solve(products + held * np.eye(len(x)), wanted)
        return np.asarray(towards + solved.T.astype(dtype, copy=False) @ x)
    products = (x.T @ x).astype(np.float64, copy=False)
    solved = np.linalg.solve(products + held * np.eye(x.shape[1]), x.T @ wanted)
    return np.asarray(towards + solved.T.astype(dtype, copy=False))


def least_squares(
    spec: ExpertSpec,
    own: Mapping[int, Matrices],
    samples: Mapping[int, Sample],
    mix: np.ndarray,
    ridge: float,
    added: Mapping[int, Matrices] | None = None,
    targets: Mapping[int, Targets] | None = None,
) -> dict[str, np.ndarray]:
    """One expert whose outputs are close to each tenant's own on that tenant's inputs: [out, in],
    in `working` type.

    The projections that read the input are fitted to the tenants' (RegMean, arXiv 2212.09849); the
    last one is fitted to the tenants' outputs on what the fitted ones hand it, so it also mends
    their errors, where RegMean fits it to the tenants' own on their own hidden values. What samples
    do not determine is as in the mixture. For the tenants of
    `samples` only. added: what residuals will add to some projections of the copy for some tenants.
    targets: of these samples, where they are known.
    """
    first, last = inputs_and_output(spec)
    added = added or {}
    start = mixture(mix, own)
    tenants = [t for t, s in samples.items() if len(s.x)]
    if not tenants:
        return start
    weights = [samples[t].weights for t in tenants]
    known = {t: targets[t] if targets else Targets.of(spec, samples[t].x, own[t]) for t in tenants}

    def less_added(wanted: np.ndarray, x: np.ndarray, t: int, name: str) -> np.ndarray:
        """What the copy is to make of x, where a residual will add the rest."""
        more = added.get(t, {}).get(name)
        return wanted if more is None else np.asarray(wanted - x @ more.T)

    # The projections that read the input share its moments, so they are solved as one.
    before = [
        np.concatenate(
            [less_added(known[t].before[name], samples[t].x, t, name) for name in first], axis=1
        )
        for t in tenants
    ]
    towards = np.concatenate([start[name] for name in first])
    both = fit_matrix([samples[t].x for t in tenants], before, weights, towards, ridge)
    found = dict(zip(first, np.split(both, len(first)), strict=True))
    copy = {name: found[name].astype(np.float32) for name in first}
    hidden = [inner(spec, samples[t].x, plus(copy, added.get(t, {}))) for t in tenants]
    outputs = [
        less_added(known[t].output, h, t, last) for t, h in zip(tenants, hidden, strict=True)
    ]
    found[last] = fit_matrix(hidden, outputs, weights, start[last], ridge)
    return found


def best_ridge(
    spec: ExpertSpec,
    positions: Iterable[tuple[Mapping[int, Matrices], Mapping[int, Sample], np.ndarray]],
) -> float:
    """The one of `RIDGES` whose fits to every second sample leave the least error on the others.

    positions: (own, samples, mix) of a few, as `least_squares` takes them.
    """
    totals = np.zeros(len(RIDGES))
    for own, samples, mix in positions:
        halves = [
            {t: Sample(s.x[i::2], s.weights[i::2]) for t, s in samples.items()} for i in (0, 1)
        ]
        whole = {t: Targets.of(spec, s.x, own[t]) for t, s in samples.items() if len(s.x)}
        targets = [
            {t: known.of_rows(slice(i, None, 2)) for t, known in whole.items()} for i in (0, 1)
        ]
        for number, ridge in enumerate(RIDGES):
            for seen, unseen in ((0, 1), (1, 0)):
                fitted = least_squares(spec, own, halves[seen], mix, ridge, targets=targets[seen])
                weights = {name: m.astype(np.float32, copy=False) for name, m in fitted.items()}
                for t, known in targets[unseen].items():
                    sample = halves[unseen][t]
                    error = (forward(spec, sample.x, weights) - known.output) ** 2
                    totals[number] += float(sample.weights @ error.sum(axis=1))
    return RIDGES[int(totals.argmin())]
