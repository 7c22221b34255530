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

from common.backend import Observer
from torch_engine.layers.attention import attention, group_of, heads_of
from torch_engine.layers.cache import Arena
from torch_engine.layers.norm import rms_norms
from torch_engine.layers.router import route_top_k
from torch_engine.pool import ExpertPool, TokenTenants
from torch_engine.products import linear
from torch_engine.segments import Segment, Segments, joined
from torch_engine.tenants.weights import TenantWeights


def _observe(
    observer: Observer, tenant: str, layer: int, normed: Tensor, expert_ids: Tensor, gates: Tensor
) -> Tensor | None:
    """Show one tenant's routing; what is to be added to its experts' weighted sum, float32 [T, H],
    if anything."""
    # Copies of their own: an observer may keep them.
    x, ids, weights = (t.cpu().numpy().copy() for t in (normed.float(), expert_ids, gates))
    added = observer(tenant, layer, x, ids, weights)
    if added is None:
        return None
    if added.shape != x.shape:
        raise ValueError(
            f"the observer returned {list(added.shape)} for x {list(x.shape)}; give the same shape "
            "or None"
        )
    return torch.from_numpy(np.ascontiguousarray(added, dtype=np.float32)).to(normed.device)


def forward(
    segments: list[Segment], pool: ExpertPool, cache: Arena | None, observer: Observer | None = None
) -> tuple[Tensor, np.ndarray]:
    """Run all layers. Returns hidden states [T, H] before the last norm, and misses int64 [T] of
    each token.

    cache: where keys and values are kept; None if no segment keeps them.
    observer: called for each segment in each layer, between router and experts.
    """
    everything = Segments(segments)
    groups = [
        group_of(list(same))
        for _, same in groupby(segments, lambda s: heads_of(s.weights.shape.attention))
    ]
    for s in segments:
        s.weights.wait(0)
    x = joined([F.embedding(s.token_ids, s.weights.embed) for s in segments])
    tenant_ids = np.concatenate(
        [np.full(s.stop - s.start, s.tenant_index, dtype=np.int64) for s in segments]
    )
    tenants = TokenTenants(tenant_ids, segments[0].tenant_index if len(segments) == 1 else None)
    misses = np.zeros(len(tenant_ids), dtype=np.int64)
    for layer in range(pool.plan.num_layers):
        for s in segments:
            s.weights.wait(layer + 1)
        weights = [s.weights.layers[layer] for s in segments]
        normed = everything.norm(x, [w.input_norm for w in weights])
        x = x + joined(
            [attention(g, layer, normed[g.segments.start : g.segments.stop], cache) for g in groups]
        )
        normed = everything.norm(x, [w.post_norm for w in weights])
        gates, expert_ids = route_top_k(
            everything.linear(normed, [w.router for w in weights]), pool.top_k
        )
        added: list[tuple[slice, Tensor]] = []
        if observer is not None:
            for s, place in everything.slices():
                name = pool.plan.tenants[s.tenant_index]
                more = _observe(
                    observer, name, layer, normed[place], expert_ids[place], gates[place]
                )
                if more is not None:
                    added.append((place, more))
        out = pool.forward(layer, normed, expert_ids, gates, tenants, misses)
        for place, more in added:
            out[place] += more
        x = x + out
    pool.counts.hits += len(tenant_ids) * pool.plan.num_layers * pool.top_k - int(misses.sum())
    return x, misses


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
        logits = linear(normed, pairs[0][0].weights.head).float()
        found += logits.split([len(x) for _, x in pairs])
    return found


def _last_norm(weights: TenantWeights, x: Tensor) -> Tensor:
    starts = np.array([0, len(x)])
    return rms_norms(weights.kernels, x, starts, [weights.norm], [weights.shape.norm_eps])
