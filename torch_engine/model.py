"""Mixtral's forward pass over tokens of several tenants.

Tokens are flat: no padding enters a matrix product. A `Segment` is the run of tokens of one tenant; what is not an
expert is computed segment by segment with the tenant's own weights, the experts once for all tokens.

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

from common.engine import Observer
from torch_engine import native
from torch_engine.cache import KeyValueCache
from torch_engine.non_expert import LayerWeights, TenantWeights
from torch_engine.pool import ExpertPool, TokenTenants
from torch_engine.products import linear
from torch_engine.rotary import rotate


@dataclass(frozen=True)
class Segment:
    """The tokens of one tenant in a step: all tokens of its prompts (prefill), or the next token of each row (decode).

    start, stop: its place among the step's tokens. token_ids, positions: int64 [T of this segment].
    rows: int64 [T], the row of each token. lengths: tokens a row after this step, on the host.
    prefill: whether every row starts at position 0.
    """

    tenant_index: int
    weights: TenantWeights
    cache: KeyValueCache
    start: int
    stop: int
    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    lengths: np.ndarray
    prefill: bool


@dataclass(frozen=True)
class _Prepared:
    """What all layers of a step share for one segment.

    mask: bool, broadcast to [B, heads, queries, keys], True where seen.
    """

    cos: Tensor
    sin: Tensor
    longest: int
    uniform: bool
    mask: Tensor | None


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
    lengths = segment.lengths
    longest = int(lengths.max())
    uniform = bool((lengths == longest).all())
    cos, sin = segment.weights.rotary.at(segment.positions, longest - 1)
    window = segment.weights.config.sliding_window
    if window is not None and window >= longest:
        window = None
    mask = None
    if segment.prefill:
        if window is not None:
            mask = _window_mask(torch.arange(longest, device=cos.device), longest, window)
    elif window is not None or not uniform:
        mask = _window_mask(segment.positions, longest, window)[:, None, None, :]
    return _Prepared(cos, sin, longest, uniform, mask)


def _attention(segment: Segment, prepared: _Prepared, layer: int, weights: LayerWeights, x: Tensor) -> Tensor:
    """[T, H] -> [T, H]: projections, rotary, cache, scaled dot products."""
    config = segment.weights.config
    n, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    num_tokens, num_rows = len(x), len(segment.lengths)
    qkv = linear(x, weights.qkv).view(num_tokens, n + 2 * g, d)
    rotated = rotate(qkv[:, : n + g], prepared.cos, prepared.sin)
    q, k, v = rotated[:, :n], rotated[:, n:], qkv[:, n + g :]
    keys, values = segment.cache.keys[layer], segment.cache.values[layer]
    longest = prepared.longest
    if prepared.uniform:
        at = slice(0, longest) if segment.prefill else slice(longest - 1, longest)
        keys[:, :, at] = k.view(num_rows, -1, g, d).transpose(1, 2)
        values[:, :, at] = v.view(num_rows, -1, g, d).transpose(1, 2)
    else:
        keys[segment.rows, :, segment.positions] = k
        values[segment.rows, :, segment.positions] = v
    kernels = segment.weights.kernels
    if not segment.prefill and kernels is not None:
        attended = native.decode_attention(kernels, q, keys, values, segment.lengths, config.sliding_window)
        return linear(attended, weights.o)
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    if not segment.prefill:
        # The query heads of a group stand in for queries, so keys and values are read once and never repeated.
        out = F.scaled_dot_product_attention(q.view(num_rows, g, n // g, d), keys, values, attn_mask=prepared.mask)
        return linear(out.reshape(num_rows, n * d), weights.o)
    if prepared.uniform:
        queries = q.view(num_rows, longest, n, d)
    else:
        queries = q.new_zeros(num_rows, longest, n, d)
        queries[segment.rows, segment.positions] = q
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys,
        values,
        attn_mask=prepared.mask,
        is_causal=prepared.mask is None,
        enable_gqa=n != g,
    ).transpose(1, 2)
    # Padding stands after a row's tokens, so a causal mask alone keeps it from being seen.
    flat = (
        out.reshape(num_tokens, n * d)
        if prepared.uniform
        else out[segment.rows, segment.positions].view(num_tokens, n * d)
    )
    return linear(flat, weights.o)


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


def forward(segments: list[Segment], pool: ExpertPool, observer: Observer | None = None) -> tuple[Tensor, np.ndarray]:
    """Run all layers. Returns hidden states [T, H] before the last norm, and misses int64 [T] of each token.

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
            attended.append(_attention(s, p, layer, weights, normed))
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
