"""Attention over tokens of several tenants, with their keys and values in the cache.

It is computed for all adjacent segments at once whose tenants have attention of one kind.
Legend: tokens T, rows B, longest row S, hidden H, query heads N, key-value heads G, head size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.families.shape import Attention
from torch_engine import native
from torch_engine.layers.cache import BLOCK, Arena, Blocks, padded_tables
from torch_engine.layers.rotary import rotate
from torch_engine.segments import Segment, Segments, joined, present
from torch_engine.tenants.weights import LayerWeights


def kind_of(attention: Attention) -> tuple[Any, ...]:
    """What tenants must agree in for their attention to be computed together; 0: none."""
    a = attention
    return a.heads, a.kv_heads, a.head_dim, a.window or 0, a.scale, a.qk_norm, a.bias, a.clip or 0.0


@dataclass(frozen=True)
class AttentionGroup:
    """Adjacent segments whose attention is computed together, and what all layers of a step share
    for them.

    Tokens are counted from the group's first. cos, sin: [T, 1, D / 2]. places: int64 [T], as of
    segments.
    single_rows: which tokens are single ones; blocks, lengths: of them all, as of `Singles`.
    fresh: chunks from position 0 on, those of one length together: (length, rows, int64 [rows *
    length] of the group's tokens, or a slice where they are adjacent, and mask). going_on: start
    and stop of the other chunks, where the keys lie, and mask.
    single_places: int64 [rows, longest], where the keys of single rows lie; None where a kernel
    reads them in place. A mask is bool, broadcast to [B, heads, queries, keys], True where seen;
    None: causal.
    """

    segments: Segments
    attention: Attention
    kernels: native.Kernels | None
    cos: Tensor
    sin: Tensor
    places: Tensor | None
    single_rows: slice | Tensor | None
    blocks: list[Blocks]
    lengths: np.ndarray
    fresh: list[tuple[int, int, Tensor | slice, Tensor | None]]
    going_on: list[tuple[int, int, Tensor, Tensor]]
    single_places: Tensor | None
    single_mask: Tensor | None


def _window_mask(queries: Tensor, num_keys: int, window: int | None) -> Tensor:
    """bool [..., keys]: a query at position p sees keys p - window < k <= p."""
    keys = torch.arange(num_keys, device=queries.device)
    seen = keys <= queries[..., None]
    return seen if window is None else seen & (keys > queries[..., None] - window)


def group_of(segments: Sequence[Segment]) -> AttentionGroup:
    """segments: adjacent, of one `kind_of`."""
    rows = Segments(segments)
    device, attention = segments[0].positions.device, segments[0].weights.shape.attention
    window, kernels = attention.window, segments[0].weights.kernels
    angles = [s.weights.rotary.at(s.positions, s.last) for s in segments]
    kept = [s.places for s in segments if s.places is not None]

    def within(longest: int) -> int | None:
        return window if window is not None and window < longest else None

    by_length: dict[int, list[int]] = {}
    going_on = []
    single_parts: list[tuple[int, int]] = []
    blocks: list[Blocks] = []
    for segment, place in rows.slices():
        for chunk in segment.chunks:
            start, stop = place.start + chunk.start, place.start + chunk.stop
            if chunk.first == 0:
                by_length.setdefault(stop - start, []).append(start)
                continue
            length = chunk.first + stop - start
            queries = torch.arange(chunk.first, length, device=device)
            assert chunk.places is not None
            going_on.append(
                (start, stop, chunk.places, _window_mask(queries, length, within(length)))
            )
        if segment.singles is not None:
            single_parts.append((place.start, place.start + len(segment.singles.lengths)))
            blocks += segment.singles.blocks
    fresh: list[tuple[int, int, Tensor | slice, Tensor | None]] = []
    for length, starts in by_length.items():
        mask = None
        if within(length) is not None:
            mask = _window_mask(torch.arange(length, device=device), length, window)
        fresh.append(
            (length, len(starts), _tokens([(s, s + length) for s in starts], device), mask)
        )
    lengths = np.concatenate(
        [s.singles.lengths for s in segments if s.singles is not None] or [np.zeros(0, np.int64)]
    )
    places = mask = None
    if blocks and kernels is None:
        longest = int(lengths.max())
        table = padded_tables(blocks)
        positions = np.arange(longest)
        places = torch.from_numpy(table[:, positions // BLOCK] * BLOCK + positions % BLOCK).to(
            device
        )
        mask = _window_mask(torch.from_numpy(lengths - 1).to(device), longest, within(longest))[
            :, None, None, :
        ]
    return AttentionGroup(
        segments=rows,
        attention=attention,
        kernels=kernels,
        cos=joined([cos for cos, _ in angles]),
        sin=joined([sin for _, sin in angles]),
        places=joined(kept) if kept else None,
        single_rows=_tokens(single_parts, device) if blocks else None,
        blocks=blocks,
        lengths=lengths,
        fresh=fresh,
        going_on=going_on,
        single_places=places,
        single_mask=mask,
    )


def _tokens(parts: Sequence[tuple[int, int]], device: torch.device) -> Tensor | slice:
    """The tokens of these (start, stop), in order."""
    if all(stop == start for (_, stop), (start, _) in pairwise(parts)):
        return slice(parts[0][0], parts[-1][1])
    return torch.from_numpy(np.concatenate([np.arange(*part) for part in parts])).to(device)


def attention(group: AttentionGroup, layer: int, x: Tensor, cache: Arena | None) -> Tensor:
    """[T, H] -> [T, H]: projections, rotary, cache, scaled dot products."""
    a = group.attention
    n, g, d = a.heads, a.kv_heads, a.head_dim
    num_tokens = len(x)
    weights = [s.weights.layers[layer] for s in group.segments.all]
    qkv = _projections(group, weights, x)
    rotated = rotate(qkv[:, : n + g], group.cos, group.sin)
    q, k, v = rotated[:, :n], rotated[:, n:], qkv[:, n + g :]
    if group.places is not None:
        assert cache is not None
        cache.write(layer, group.places, k.reshape(num_tokens, g * d), v.reshape(num_tokens, g * d))
    parts: list[tuple[slice | Tensor, Tensor]] = []
    if group.single_rows is not None:
        assert cache is not None
        parts.append(
            (group.single_rows, _attend_singles(group, layer, q[group.single_rows], cache))
        )
    for length, count, tokens, mask in group.fresh:
        found = _attend(q[tokens], k[tokens], v[tokens], count, length, mask, a.scale)
        parts.append((tokens, found))
    for start, stop, places, mask in group.going_on:
        assert cache is not None
        keys, values = (t.view(-1, g, d) for t in cache.read(layer, places, g * d))
        found = _attend(q[start:stop], keys, values, 1, stop - start, mask, a.scale)
        parts.append((slice(start, stop), found))
    attended = parts[0][1]
    if len(parts) > 1:
        attended = x.new_empty(num_tokens, n * d)
        for tokens, found in parts:
            attended[tokens] = found
    out = group.segments.linear(attended, [w.o for w in weights])
    if a.bias:
        group.segments.plus(out, present([w.o_bias for w in weights]))
    return out


def _projections(group: AttentionGroup, weights: Sequence[LayerWeights], x: Tensor) -> Tensor:
    """Queries, keys and values before the rotation: [T, H] -> [T, N + 2 * G, D]."""
    a, segments, num_tokens = group.attention, group.segments, len(x)
    n, g, d = a.heads, a.kv_heads, a.head_dim
    qkv = segments.linear(x, [w.qkv for w in weights])
    if a.bias:
        segments.plus(qkv, present([w.qkv_bias for w in weights]))
    if a.qk_norm != "none":
        q_norms = present([w.q_norm for w in weights])
        k_norms = present([w.k_norm for w in weights])
        q, k, v = qkv.split((n * d, g * d, g * d), dim=1)
        if a.qk_norm == "head":
            q = segments.norm(q.reshape(-1, d), q_norms, n).view(num_tokens, n * d)
            k = segments.norm(k.reshape(-1, d), k_norms, g).view(num_tokens, g * d)
        else:
            q, k = segments.norm(q, q_norms), segments.norm(k, k_norms)
        qkv = torch.cat((q, k, v), dim=1)
    if a.clip is not None:
        qkv.clamp_(-a.clip, a.clip)
    return qkv.view(num_tokens, n + 2 * g, d)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: int, queries: int, mask: Tensor | None, scale: float
) -> Tensor:
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
        scale=scale,
    )
    return out.transpose(1, 2).reshape(rows * queries, n * d)


def _attend_singles(group: AttentionGroup, layer: int, q: Tensor, cache: Arena) -> Tensor:
    """One new token a row, itself in the cache already: [B, N, D] -> [B, N * D]."""
    g = group.attention.kv_heads
    rows, n, d = q.shape
    if group.kernels is not None:
        keys, values = cache.keys[layer], cache.values[layer]
        tables = [b.table for b in group.blocks]
        a = group.attention
        return native.decode_attention(
            group.kernels, q, keys, values, g, tables, BLOCK, group.lengths, a.window, a.scale
        )
    assert group.single_places is not None
    keys, values = (
        t.view(rows, -1, g, d).transpose(1, 2)
        for t in cache.read(layer, group.single_places, g * d)
    )
    # The query heads of a group stand in for queries, so keys and values are read once and never
    # repeated.
    out = F.scaled_dot_product_attention(
        q.reshape(rows, g, n // g, d),
        keys,
        values,
        attn_mask=group.single_mask,
        scale=group.attention.scale,
    )
    return out.reshape(rows, n * d)
