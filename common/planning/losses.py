"""What it would cost each tenant to be served by other weights at a position, predicted before
anything is built.

The loss is the gate-weighted output error `E[g^2 |f_tenant(x) - f_copy(x)|^2]` a token, over the
tokens that the tenant's own router sends to the position (the term that remains of REAP's analysis,
arXiv 2510.13999, when tenants share a position and keep their routers), times the layer's measured
sensitivity: an estimate of the divergence in nats.

A merged copy is a weighted sum of tenants' weights, `sum_c w_c W_c` with `sum_c w_c = 1`. For
fine-tunes of one model its output is, to first order, the weighted sum of outputs, so that the loss
of tenant t is the quadratic form `w^T Q_t w` with `Q_t[c, c'] = E[g^2 <f_c(x) - f_t(x), f_c'(x) -
f_t(x)>]`. Without calibration the outputs are replaced by the weights themselves, and Q_t follows
from the distances of pairs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.plan.distance import Distances
from common.plan.expert_math import forward
from common.plan.profile import Profile
from common.planning.workers import position_bytes, side_by_side
from common.progress import Progress, silent
from common.store.store import Store

UNITS = ("squared distance", "squared error", "nats")


@dataclass(frozen=True)
class Losses:
    """gram: float64 [tenants t, layers, experts, tenants c, tenants c'], the Q_t above, in the
    units of the loss.

    frequency: float64 [tenants, layers, experts], how often a token picks the expert; where
        calibration is absent, top_k / experts.
    scale: float64 [tenants, layers, experts]: the loss of any weights is so many times the sum of
        `g^2 |error|^2` over the tenant's samples; where it has none (sampled false), of the squared
        differences of weights.
    sampled: bool [tenants, layers, experts].
    measured: names of tenants whose losses rest on calibration.
    unit: "nats"; "squared error" of outputs where no tenant's sensitivity is known (one that was
        calibrated when it was alone, or beside its equals); "squared distance" without calibration.
    """

    tenants: tuple[str, ...]
    gram: np.ndarray
    frequency: np.ndarray
    scale: np.ndarray
    sampled: np.ndarray
    measured: tuple[str, ...]
    unit: str

    def single(self) -> np.ndarray:
        """float64 [tenants t, layers, experts, tenants c]: the loss of t with c's own expert."""
        return np.asarray(np.einsum("tlecc->tlec", self.gram))

    def of(self, tenant: int, layer: int, expert: int, mix: np.ndarray) -> float:
        """The loss of a tenant with a weighted sum of tenants' experts. mix: [tenants], summing to
        1."""
        return float(mix @ self.gram[tenant, layer, expert] @ mix)


def gram_of_distances(squared: np.ndarray) -> np.ndarray:
    """Q_t from squared distances float64 [T, T]: `(d_tc^2 + d_tc'^2 - d_cc'^2) / 2`, float64 [T, T,
    T]."""
    return np.asarray((squared[:, :, None] + squared[:, None, :] - squared[None]) / 2)


def square_matrices(distances: Distances) -> np.ndarray:
    """Squared distances float64 [layers, experts, tenants, tenants]."""
    count = len(distances.tenants)
    found = np.zeros((*distances.matrix.shape[1:], count, count))
    for (a, b), values in zip(distances.pairs, distances.matrix, strict=True):
        found[:, :, a, b] = found[:, :, b, a] = values**2
    return found


def losses_of_weights(distances: Distances, top_k: int) -> Losses:
    """From distances alone: every expert counts the same, a squared distance is the loss."""
    squared = square_matrices(distances)
    layers, experts, count, _ = squared.shape
    gram = np.empty((count, layers, experts, count, count))
    for layer in range(layers):
        for expert in range(experts):
            gram[:, layer, expert] = gram_of_distances(squared[layer, expert])
    scale = np.full((count, layers, experts), top_k / experts)
    gram *= top_k / experts
    return Losses(
        distances.tenants, gram, scale, scale, np.zeros(scale.shape, dtype=bool), (), UNITS[0]
    )


def measure_losses(
    store: Store, profiles: Mapping[str, Profile], progress: Progress = silent
) -> Losses:
    """Losses on calibration samples; tenants without a profile are judged by weights, scaled to the
    others.

    Memory: one expert, and every tenant's outputs on all tenants' samples of one position.
    """
    by_weights = losses_of_weights(store.distances, store.experts.top_k)
    names = store.tenants
    measured = tuple(name for name in names if name in profiles)
    if not measured:
        return by_weights
    spec, count = store.experts, len(names)
    gram, frequency = np.zeros_like(by_weights.gram), by_weights.frequency.copy()
    scale, sampled = by_weights.scale.copy(), by_weights.sampled.copy()

    def compare(place: tuple[int, int]) -> None:
        layer, expert = place
        samples = {name: profiles[name].sample(layer, expert) for name in measured}
        x = np.concatenate([samples[name][0] for name in measured])
        if len(x):
            outputs = np.stack(
                [forward(spec, x, store.own_expert(name, layer, expert)) for name in names]
            )
        start = 0
        for name in measured:
            t, profile = names.index(name), profiles[name]
            rows, gates = samples[name]
            frequency[t, layer, expert] = profile.counts[layer, expert] / max(
                1, profile.tokens[layer]
            )
            if not len(rows):
                continue
            part = outputs[:, start : start + len(rows)]
            start += len(rows)
            error = ((part - part[t]) * gates[:, None]).reshape(count, -1).astype(np.float64)
            # The sample stands for all tokens: by squared gates, as the loss weights them.
            share = profile.gate_squares[layer, expert] / max(
                1e-30, float((gates.astype(np.float64) ** 2).sum())
            )
            sensitivity = _sensitivity(profiles, name, layer)
            scale[t, layer, expert] = share / max(1, profile.tokens[layer]) * sensitivity
            sampled[t, layer, expert] = True
            gram[t, layer, expert] = error @ error.T * scale[t, layer, expert]

    places = list(np.ndindex(spec.num_layers, spec.num_experts))
    with progress("comparing experts on calibration inputs", spec.num_positions) as advance:
        for _ in side_by_side(compare, places, position_bytes(spec, count)):
            advance()
    _scale_unsampled(gram, scale, sampled, by_weights.gram, profiles, names)
    known = any((profiles[name].sensitivity > 0).any() for name in measured)
    unit = UNITS[2 if known else 1] if sampled.any() else UNITS[0]
    return Losses(names, gram, frequency, scale, sampled, measured, unit)


def _sensitivity(profiles: Mapping[str, Profile], name: str, layer: int) -> float:
    """A layer's; the tenant's median for a layer that could not be measured, and the others' for a
    tenant of which
    none could: in one plan all losses have one unit."""
    mine, others = profiles[name].sensitivity, [p.sensitivity for p in profiles.values()]
    for found in (
        mine[layer : layer + 1],
        mine,
        np.array([o[layer] for o in others]),
        np.concatenate(others),
    ):
        if (found > 0).any():
            return float(np.median(found[found > 0]))
    return 1.0


def _ratio(traces: np.ndarray, distances: np.ndarray) -> float:
    """Of sums; 0 where all experts are the same, which says nothing."""
    return float(traces.sum() / distances.sum()) if distances.sum() > 0 else 0.0


def _scale_unsampled(
    gram: np.ndarray,
    scale: np.ndarray,
    sampled: np.ndarray,
    by_weights: np.ndarray,
    profiles: Mapping[str, Profile],
    names: tuple[str, ...],
) -> None:
    """Loss by squared difference of weights where there are no samples.

    An expert that calibration never picked counts as picked once, with its layer's usual error for
    a difference; a tenant without calibration counts as the usual one of the others.
    """
    traces, distances = (np.trace(a, axis1=3, axis2=4) for a in (gram, by_weights))
    everyone = _ratio(traces[sampled], distances[sampled]) or 1.0
    for t, layer, expert in np.argwhere(~sampled):
        usual = everyone
        if names[t] in profiles:
            picked = sampled[t, layer]
            picks = profiles[names[t]].counts[layer][picked]
            if picked.any():
                usual = (
                    _ratio(traces[t, layer][picked] / picks, distances[t, layer][picked])
                    or everyone
                )
        gram[t, layer, expert] = by_weights[t, layer, expert] * usual
        scale[t, layer, expert] *= usual
