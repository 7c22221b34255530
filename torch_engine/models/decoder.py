"""The forward pass of a `Decoder` over tokens of several tenants.

Products with what is not an expert are computed segment by segment with the tenant's own weights,
in one call of our own kernels where they are used; the experts, and all that needs no weights, once
for all tokens.

Order of rounding as in transformers, models/mixtral/modeling_mixtral.py.
Legend: tokens T, hidden H, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import EngineError
from common.families import Decoder
from common.families.shape import Dense, Rope, Sparse
from common.serving.backend import Observer
from torch_engine.experts.pool import ExpertPool
from torch_engine.experts.token_tenants import TokenTenants
from torch_engine.layers.attention import attention, group_of, kind_of
from torch_engine.layers.cache import Arena
from torch_engine.layers.mlp import dense
from torch_engine.layers.norm import rms_norms
from torch_engine.layers.router import route
from torch_engine.segments import Segment, Segments, joined, present, scaled
from torch_engine.tenants.weights import TenantWeights


def check(shape: Decoder, tenant: str) -> None:
    """Raises EngineError for what a shape can say and this model does not compute."""
    router = shape.experts.router
    for unsupported, what in (
        (not isinstance(shape.attention.positions, Rope), "relative positions"),
        (not shape.experts.gated, "experts without a gate"),
        (router.dtype != "hidden", f"a router in {router.dtype}"),
        (router.bias, "a router with a bias"),
        (router.capacity is not None, "experts of limited capacity"),
        (shape.scalars.head_input != 1.0, "a scaled input of the head"),
    ):
        if unsupported:
            raise EngineError(
                f"tenant {tenant!r} has {what}, which the torch engine cannot compute"
            )


def forward(
    segments: list[Segment], pool: ExpertPool, cache: Arena | None, observer: Observer | None = None
) -> tuple[Tensor, np.ndarray]:
    """Run all layers. Returns hidden states [T, H] before the last norm, and misses int64 [T] of
    each token.

    cache: where keys and values are kept; None if no segment keeps them.
    observer: called for each segment in each layer, between router and experts.
    """
    everything = Segments(segments)
    shapes = [s.weights.shape for s in segments]
    groups = [
        group_of(list(same))
        for _, same in groupby(segments, lambda s: kind_of(s.weights.shape.attention))
    ]
    for s in segments:
        s.weights.wait(0)
    x = joined([F.embedding(s.token_ids, s.weights.embed) for s in segments])
    x = scaled(x, everything, [shape.scalars.embedding for shape in shapes])
    residuals = [shape.scalars.residual for shape in shapes]
    tenant_ids = np.concatenate(
        [np.full(s.stop - s.start, s.tenant_index, dtype=np.int64) for s in segments]
    )
    tenants = TokenTenants(tenant_ids, segments[0].tenant_index if len(segments) == 1 else None)
    misses = np.zeros(len(tenant_ids), dtype=np.int64)
    for layer, mlp in enumerate(shapes[0].layers):
        for s in segments:
            s.weights.wait(layer + 1)
        weights = [s.weights.layers[layer] for s in segments]
        normed = everything.norm(x, [w.input_norm for w in weights])
        out = joined(
            [attention(g, layer, normed[g.segments.start : g.segments.stop], cache) for g in groups]
        )
        x = x + scaled(out, everything, residuals)
        normed = everything.norm(x, [w.post_norm for w in weights])
        if isinstance(mlp, Dense):
            out = dense(everything, layer, normed)
        else:
            gates, expert_ids = _route(everything, layer, normed)
            added: list[tuple[slice, Tensor]] = []
            if observer is not None:
                shown = (normed.float(), expert_ids, gates)
                added = _observe(observer, everything, pool, mlp, shown)
            out = pool.forward(mlp.position, normed, expert_ids, gates, tenants, misses)
            for place, more in added:
                out[place] += more
        x = x + scaled(out, everything, residuals)
    pool.counts.hits += len(tenant_ids) * pool.plan.num_layers * pool.top_k - int(misses.sum())
    return x, misses


def _route(segments: Segments, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates float32 [T, K] and expert_ids int64 [T, K] of each tenant's router."""
    weights = [s.weights.layers[layer] for s in segments.all]
    logits = segments.linear(x, present([w.router for w in weights]))
    routers = [s.weights.shape.experts.router for s in segments.all]
    if len(set(routers)) == 1:
        return route(routers[0], logits)
    parts = [route(r, logits[at]) for (_, at), r in zip(segments.slices(), routers, strict=True)]
    gates, expert_ids = zip(*parts, strict=True)
    return torch.cat(gates), torch.cat(expert_ids)


def _observe(
    observer: Observer,
    segments: Segments,
    pool: ExpertPool,
    mlp: Sparse,
    routing: tuple[Tensor, Tensor, Tensor],
) -> list[tuple[slice, Tensor]]:
    """Show each tenant's routing: (x, expert_ids, gates). Returns what is to be added to the
    experts' weighted sum, float32 [T, H], and to which tokens."""
    added: list[tuple[slice, Tensor]] = []
    for segment, place in segments.slices():
        # Copies of their own: an observer may keep them.
        x, ids, gates = (t[place].cpu().numpy().copy() for t in routing)
        tenant = pool.plan.tenants[segment.tenant_index]
        more = observer(tenant, mlp.position, x, ids, gates)
        if more is None:
            continue
        if more.shape != x.shape:
            raise ValueError(
                f"the observer returned {list(more.shape)} for x {list(x.shape)}; give the same "
                "shape or None"
            )
        more = np.ascontiguousarray(more, dtype=np.float32)
        added.append((place, torch.from_numpy(more).to(routing[0].device)))
    return added


def heads(segments: Sequence[Segment], hidden: Sequence[Tensor]) -> list[Tensor]:
    """Last norm and language-model head of some tokens of each segment: [T, H] -> float32 [T, V]
    each.

    Adjacent segments whose tenants have one head have one product.
    """
    found: list[Tensor] = []
    for _, same in groupby(
        zip(segments, hidden, strict=True), lambda pair: id(pair[0].weights.head)
    ):
        pairs = list(same)
        for segment, _ in pairs:
            segment.weights.wait(len(segment.weights.shape.layers) + 1)
        normed = joined([_last_norm(segment.weights, x) for segment, x in pairs])
        logits = pairs[0][0].weights.head.multiply(normed).split([len(x) for _, x in pairs])
        for (segment, _), values in zip(pairs, logits, strict=True):
            divisor = segment.weights.shape.scalars.logits_divisor
            found.append((values if divisor == 1.0 else values / divisor).float())
    return found


def _last_norm(weights: TenantWeights, x: Tensor) -> Tensor:
    starts = np.array([0, len(x)])
    return rms_norms(weights.kernels, x, starts, [weights.norm], [weights.shape.norm_eps])
