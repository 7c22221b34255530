"""Mixtral's forward pass over tokens of several tenants.

Tokens are flat: no padding enters a matrix product. A `Segment` holds the tokens of one tenant, be they next tokens of
answers or pieces of prompts; what is not an expert is computed segment by segment with the tenant's own weights, the
experts once for all tokens.

Source: Mixtral of Experts (arXiv 2401.04088); names and order of rounding as in transformers,
models/mixtral/modeling_mixtral.py.
Legend: tokens T, rows B, longest row S, hidden H, query heads N, key-value heads G, head size D, experts E, top_k K,
vocabulary V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.backend import Observer
from torch_engine import native
from torch_engine.cache import BLOCK, Arena, Blocks, padded_tables
from torch_engine.non_expert import LayerWeights, TenantWeights
from torch_engine.pool import ExpertPool, TokenTenants
from torch_engine.products import linear
from torch_engine.rotary import rotate


@dataclass(frozen=True)
class Run:
    """Tokens of one sequence that are read in a step: start..stop of the segment's, at positions first...

    places: int64 [first + stop - start], where the sequence's keys lie in the cache; None if they are not kept and
    first is 0.
    """

    start: int
    stop: int
    first: int
    places: Tensor | None


@dataclass(frozen=True)
class Singles:
    """The rows that append one token each: the first tokens of a segment, a row each.

    blocks: where their keys lie. lengths: int64 [rows] on the host, tokens after this step.
    """

    blocks: list[Blocks]
    lengths: np.ndarray


@dataclass(frozen=True)
class Segment:
    """The tokens of one tenant in a step: first single ones, then runs.

    start, stop: its place among the step's tokens. token_ids, positions: int64 [T of this segment].
    places: int64 [T], where keys and values go in the cache; None if they are not kept. last: the largest position.
    """

    tenant_index: int
    weights: TenantWeights
    start: int
    stop: int
    token_ids: Tensor
    positions: Tensor
    places: Tensor | None
    last: int
    singles: Singles | None
    runs: list[Run]


@dataclass(frozen=True)
class _Prepared:
    """What all layers of a step share for one segment.

    fresh: runs from position 0 on, those of one length together: (length, int64 [rows, length] of the segment's
    tokens, or a slice where they are adjacent, and mask). going_on: the other runs, each with its mask.
    single_places: int64 [rows, longest], where the keys of single rows lie; None where a kernel reads them in place.
    A mask is bool, broadcast to [B, heads, queries, keys], True where seen; None: causal.
    """

    cos: Tensor
    sin: Tensor
    fresh: list[tuple[int, int, Tensor | slice, Tensor | None]]
    going_on: list[tuple[Run, Tensor]]
    single_places: Tensor | None
    single_mask: Tensor | None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H]; the mean square in float32, the product with the weight in the type of x (as transformers rounds)."""
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True).add_(eps))
    return scaled.to(x.dtype).mul_(weight)


def _norm(weights: TenantWeights, x: Tensor, norm: Tensor) -> Tensor:
    """`rms_norm` with a tenant's epsilon, in one call of our own kernels where they are used."""
    if weights.kernels is not None and len(x) <= weights.kernels.max_rows:
        return native.rms_norm(weights.kernels, x, norm, weights.config.rms_norm_eps)
    return rms_norm(x, norm, weights.config.rms_norm_eps)


def route_top_k(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Pick each token's experts, weights renormalised over the picked ones.

    router_logits: [T, E] in any float type. Returns weights float32 [T, K], expert_ids int64 [T, K].
    Source: arXiv 2401.04088, section 2.1; transformers softmaxes in float32 over all experts first, which is the same.
    """
    values, expert_ids = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    return values / values.sum(dim=-1, keepdim=True), expert_ids


def _window_mask(queries: Tensor, num_keys: int, window: int | None) -> Tensor:
    """bool [..., keys]: a query at position p sees keys p - window < k <= p."""
    keys = torch.arange(num_keys, device=queries.device)
    seen = keys <= queries[..., None]
    return seen if window is None else seen & (keys > queries[..., None] - window)


def _prepare(segment: Segment) -> _Prepared:
    device = segment.positions.device
    cos, sin = segment.weights.rotary.at(segment.positions, segment.last)
    window = segment.weights.config.sliding_window

    def within(longest: int) -> int | None:
        return window if window is not None and window < longest else None

    by_length: dict[int, list[Run]] = {}
    going_on = []
    for run in segment.runs:
        if run.first == 0:
            by_length.setdefault(run.stop - run.start, []).append(run)
        else:
            length = run.first + run.stop - run.start
            queries = torch.arange(run.first, length, device=device)
            going_on.append((run, _window_mask(queries, length, within(length))))
    fresh: list[tuple[int, int, Tensor | slice, Tensor | None]] = []
    for length, runs in by_length.items():
        mask = None
        if within(length) is not None:
            mask = _window_mask(torch.arange(length, device=device), length, window)
        tokens: Tensor | slice = slice(runs[0].start, runs[-1].stop)
        if runs[-1].stop - runs[0].start != length * len(runs):
            starts = torch.tensor([r.start for r in runs], device=device)
            tokens = (starts[:, None] + torch.arange(length, device=device)).reshape(-1)
        fresh.append((length, len(runs), tokens, mask))
    places = mask = None
    singles = segment.singles
    if singles is not None and segment.weights.kernels is None:
        longest = int(singles.lengths.max())
        table = padded_tables(singles.blocks)
        positions = np.arange(longest)
        places = torch.from_numpy(table[:, positions // BLOCK] * BLOCK + positions % BLOCK).to(device)
        queries = torch.from_numpy(singles.lengths - 1).to(device)
        mask = _window_mask(queries, longest, within(longest))[:, None, None, :]
    return _Prepared(cos, sin, fresh, going_on, places, mask)


def _attention(
    segment: Segment, prepared: _Prepared, layer: int, weights: LayerWeights, x: Tensor, cache: Arena | None
) -> Tensor:
    """[T, H] -> [T, H]: projections, rotary, cache, scaled dot products."""
    config = segment.weights.config
    n, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    num_tokens = len(x)
    qkv = linear(x, weights.qkv).view(num_tokens, n + 2 * g, d)
    rotated = rotate(qkv[:, : n + g], prepared.cos, prepared.sin)
    q, k, v = rotated[:, :n], rotated[:, n:], qkv[:, n + g :]
    if segment.places is not None:
        assert cache is not None
        cache.write(layer, segment.places, k.reshape(num_tokens, g * d), v.reshape(num_tokens, g * d))
    parts: list[tuple[slice | Tensor, Tensor]] = []
    if segment.singles is not None:
        assert cache is not None
        rows = slice(0, len(segment.singles.lengths))
        parts.append((rows, _attend_singles(segment, prepared, layer, q[rows], cache)))
    for length, count, tokens, mask in prepared.fresh:
        parts.append((tokens, _attend(q[tokens], k[tokens], v[tokens], count, length, mask)))
    for run, mask in prepared.going_on:
        assert cache is not None and run.places is not None
        keys, values = (t.view(-1, g, d) for t in cache.read(layer, run.places, g * d))
        tokens = slice(run.start, run.stop)
        parts.append((tokens, _attend(q[tokens], keys, values, 1, run.stop - run.start, mask)))
    if len(parts) == 1:
        return linear(parts[0][1], weights.o)
    whole = x.new_empty(num_tokens, n * d)
    for tokens, found in parts:
        whole[tokens] = found
    return linear(whole, weights.o)


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: int, queries: int, mask: Tensor | None) -> Tensor:
    """q: [rows * queries, N, D]; k, v: [rows * keys, G, D]. Returns [rows * queries, N * D]."""
    n, d = q.shape[1:]
    g = k.shape[1]
    out = F.scaled_dot_product_attention(
        q.view(rows, queries, n, d).transpose(1, 2),
        k.reshape(rows, -1, g, d).transpose(1, 2),
        v.reshape(rows, -1, g, d).transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=n != g,
    )
    return out.transpose(1, 2).reshape(rows * queries, n * d)


def _attend_singles(segment: Segment, prepared: _Prepared, layer: int, q: Tensor, cache: Arena) -> Tensor:
    """One new token a row, itself in the cache already: [B, N, D] -> [B, N * D]."""
    singles, config, kernels = segment.singles, segment.weights.config, segment.weights.kernels
    assert singles is not None
    g = config.num_key_value_heads
    rows, n, d = q.shape
    if kernels is not None:
        keys, values = cache.keys[layer], cache.values[layer]
        tables = [b.table for b in singles.blocks]
        return native.decode_attention(
            kernels, q, keys, values, g, tables, BLOCK, singles.lengths, config.sliding_window
        )
    assert prepared.single_places is not None
    keys, values = (t.view(rows, -1, g, d).transpose(1, 2) for t in cache.read(layer, prepared.single_places, g * d))
    # The query heads of a group stand in for queries, so keys and values are read once and never repeated.
    out = F.scaled_dot_product_attention(q.reshape(rows, g, n // g, d), keys, values, attn_mask=prepared.single_mask)
    return out.reshape(rows, n * d)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _observe(
    observer: Observer, tenant: str, layer: int, normed: Tensor, expert_ids: Tensor, gates: Tensor
) -> Tensor | None:
    """Show one tenant's routing; what is to be added to its experts' weighted sum, float32 [T, H], if anything."""
    # Copies of their own: an observer may keep them.
    x, ids, weights = (t.cpu().numpy().copy() for t in (normed.float(), expert_ids, gates))
    added = observer(tenant, layer, x, ids, weights)
    if added is None:
        return None
    if added.shape != x.shape:
        raise ValueError(
            f"the observer returned {list(added.shape)} for x {list(x.shape)}; give the same shape or None"
        )
    return torch.from_numpy(np.ascontiguousarray(added, dtype=np.float32)).to(normed.device)


def forward(
    segments: list[Segment], pool: ExpertPool, cache: Arena | None, observer: Observer | None = None
) -> tuple[Tensor, np.ndarray]:
    """Run all layers. Returns hidden states [T, H] before the last norm, and misses int64 [T] of each token.

    cache: where keys and values are kept; None if no segment keeps them.
    observer: called for each segment in each layer, between router and experts.
    """
    prepared = [_prepare(s) for s in segments]
    for s in segments:
        s.weights.wait(0)
    x = _joined([F.embedding(s.token_ids, s.weights.embed) for s in segments])
    tenant_ids = np.concatenate([np.full(s.stop - s.start, s.tenant_index, dtype=np.int64) for s in segments])
    tenants = TokenTenants(tenant_ids, segments[0].tenant_index if len(segments) == 1 else None)
    misses = np.zeros(len(tenant_ids), dtype=np.int64)
    for layer in range(pool.plan.num_layers):
        attended = []
        for s, p in zip(segments, prepared, strict=True):
            s.weights.wait(layer + 1)
            weights = s.weights.layers[layer]
            normed = _norm(s.weights, x[s.start : s.stop], weights.input_norm)
            attended.append(_attention(s, p, layer, weights, normed, cache))
        x = x + _joined(attended)
        normed_parts, routed = [], []
        added: list[tuple[Segment, Tensor]] = []
        for s in segments:
            weights = s.weights.layers[layer]
            normed = _norm(s.weights, x[s.start : s.stop], weights.post_norm)
            normed_parts.append(normed)
            routed.append(route_top_k(linear(normed, weights.router), pool.top_k))
            if observer is not None:
                more = _observe(
                    observer, pool.plan.tenants[s.tenant_index], layer, normed, routed[-1][1], routed[-1][0]
                )
                if more is not None:
                    added.append((s, more))
        gates, expert_ids = _joined([r[0] for r in routed]), _joined([r[1] for r in routed])
        out = pool.forward(layer, _joined(normed_parts), expert_ids, gates, tenants, misses)
        for s, more in added:
            out[s.start : s.stop] += more
        x = x + out
    pool.counts.hits += len(tenant_ids) * pool.plan.num_layers * pool.top_k - int(misses.sum())
    return x, misses


def head(segment: Segment, hidden: Tensor) -> Tensor:
    """Last norm and language-model head: [T, H] -> float32 [T, V]."""
    segment.weights.wait(segment.weights.config.experts.num_layers + 1)
    normed = _norm(segment.weights, hidden, segment.weights.norm)
    return linear(normed, segment.weights.head).float()
