"""Mixtral's forward pass over tokens of several tenants.

Tokens are flat: no padding enters a matrix product. A `Segment` holds the tokens of one tenant, be
they next tokens of answers or pieces of prompts. Products with what is not an expert are computed
segment by segment with the tenant's own weights, in one call of our own kernels where they are
used; the experts, and all that needs no weights, once for all tokens. Attention is computed for all
adjacent segments at once that have heads of the same shape (`Group`).

Source: Mixtral of Experts (arXiv 2401.04088); names and order of rounding as in transformers,
models/mixtral/modeling_mixtral.py.
Legend: tokens T, rows B, longest row S, hidden H, query heads N, key-value heads G, head size D,
experts E, top_k K, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.families import MixtralConfig
from common.serving.backend import Observer
from torch_engine import native
from torch_engine.cache import BLOCK, Arena, Blocks, padded_tables
from torch_engine.experts.pool import ExpertPool
from torch_engine.experts.routing import TokenTenants
from torch_engine.non_expert import TenantWeights
from torch_engine.products import linear, linears
from torch_engine.rotary import rotate


@dataclass(frozen=True)
class Run:
    """Tokens of one sequence that are read in a step: start..stop of the segment's, at positions
    first...

    places: int64 [first + stop - start], where the sequence's keys lie in the cache; None if they
    are not kept and first is 0.
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
    places: int64 [T], where keys and values go in the cache; None if they are not kept. last: the
        largest position.
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


def heads_of(config: MixtralConfig) -> tuple[int, int, int, int]:
    """What tenants must agree in for their attention to be computed together; 0: no window."""
    window = config.sliding_window or 0
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim, window


class Rows:
    """Adjacent segments, and where each one's tokens begin, counted from the first's: int64
    [segments + 1]."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments = segments
        self.start, self.stop = segments[0].start, segments[-1].stop
        self.starts = np.array(
            [s.start - self.start for s in segments] + [self.stop - self.start], dtype=np.int64
        )
        self._kernels = segments[0].weights.kernels
        self._eps = np.array([s.weights.config.rms_norm_eps for s in segments], dtype=np.float32)

    def slices(self) -> Iterator[tuple[Segment, slice]]:
        for segment, start, stop in zip(
            self.segments, self.starts[:-1], self.starts[1:], strict=True
        ):
            yield segment, slice(int(start), int(stop))

    def norm(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """`rms_norm` with each tenant's weight, in one call of our own kernels where they are
        used."""
        if self._kernels is not None:
            return native.rms_norms(self._kernels, x, self.starts, weights, self._eps)
        parts = zip(self.slices(), weights, strict=True)
        return _joined(
            [rms_norm(x[at], weight, s.weights.config.rms_norm_eps) for (s, at), weight in parts]
        )


@dataclass(frozen=True)
class Group:
    """Adjacent segments whose attention is computed together, and what all layers of a step share
    for them.

    Tokens are counted from the group's first. cos, sin: [T, 1, D / 2]. places: int64 [T], as of
    segments.
    single_rows: which tokens are single ones; blocks, lengths: of them all, as of `Singles`.
    fresh: runs from position 0 on, those of one length together: (length, rows, int64 [rows *
    length] of the group's tokens, or a slice where they are adjacent, and mask). going_on: start
    and stop of the other runs, where the keys lie, and mask.
    single_places: int64 [rows, longest], where the keys of single rows lie; None where a kernel
    reads them in place. A mask is bool, broadcast to [B, heads, queries, keys], True where seen;
    None: causal.
    """

    rows: Rows
    config: MixtralConfig
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H]; the mean square in float32, the product with the weight in the type of x (as
    transformers rounds)."""
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True).add_(eps))
    return scaled.to(x.dtype).mul_(weight)


def route_top_k(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Pick each token's experts, weights renormalised over the picked ones.

    router_logits: [T, E] in any float type. Returns weights float32 [T, K], expert_ids int64 [T,
        K].
    Source: arXiv 2401.04088, section 2.1; transformers softmaxes in float32 over all experts first,
        which is the same.
    """
    values, expert_ids = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    return values / values.sum(dim=-1, keepdim=True), expert_ids


def _window_mask(queries: Tensor, num_keys: int, window: int | None) -> Tensor:
    """bool [..., keys]: a query at position p sees keys p - window < k <= p."""
    keys = torch.arange(num_keys, device=queries.device)
    seen = keys <= queries[..., None]
    return seen if window is None else seen & (keys > queries[..., None] - window)


def _group(segments: Sequence[Segment]) -> Group:
    """segments: adjacent, of one `heads_of`."""
    rows = Rows(segments)
    device, config = segments[0].positions.device, segments[0].weights.config
    window, kernels = config.sliding_window, segments[0].weights.kernels
    angles = [s.weights.rotary.at(s.positions, s.last) for s in segments]
    kept = [s.places for s in segments if s.places is not None]

    def within(longest: int) -> int | None:
        return window if window is not None and window < longest else None

    by_length: dict[int, list[int]] = {}
    going_on = []
    single_parts: list[tuple[int, int]] = []
    blocks: list[Blocks] = []
    for segment, place in rows.slices():
        for run in segment.runs:
            start, stop = place.start + run.start, place.start + run.stop
            if run.first == 0:
                by_length.setdefault(stop - start, []).append(start)
                continue
            length = run.first + stop - start
            queries = torch.arange(run.first, length, device=device)
            assert run.places is not None
            going_on.append(
                (start, stop, run.places, _window_mask(queries, length, within(length)))
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
    return Group(
        rows=rows,
        config=config,
        kernels=kernels,
        cos=_joined([cos for cos, _ in angles]),
        sin=_joined([sin for _, sin in angles]),
        places=_joined(kept) if kept else None,
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


def _attention(group: Group, layer: int, x: Tensor, cache: Arena | None) -> Tensor:
    """[T, H] -> [T, H]: projections, rotary, cache, scaled dot products."""
    n, g, d, _ = heads_of(group.config)
    num_tokens = len(x)
    weights = [s.weights.layers[layer] for s in group.rows.segments]
    qkv = linears(x, group.rows.starts, [w.qkv for w in weights]).view(num_tokens, n + 2 * g, d)
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
        parts.append((tokens, _attend(q[tokens], k[tokens], v[tokens], count, length, mask)))
    for start, stop, places, mask in group.going_on:
        assert cache is not None
        keys, values = (t.view(-1, g, d) for t in cache.read(layer, places, g * d))
        parts.append(
            (slice(start, stop), _attend(q[start:stop], keys, values, 1, stop - start, mask))
        )
    attended = parts[0][1]
    if len(parts) > 1:
        attended = x.new_empty(num_tokens, n * d)
        for tokens, found in parts:
            attended[tokens] = found
    return linears(attended, group.rows.starts, [w.o for w in weights])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: int, queries: int, mask: Tensor | None
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
    )
    return out.transpose(1, 2).reshape(rows * queries, n * d)


def _attend_singles(group: Group, layer: int, q: Tensor, cache: Arena) -> Tensor:
    """One new token a row, itself in the cache already: [B, N, D] -> [B, N * D]."""
    g = group.config.num_key_value_heads
    rows, n, d = q.shape
    if group.kernels is not None:
        keys, values = cache.keys[layer], cache.values[layer]
        tables = [b.table for b in group.blocks]
        window = group.config.sliding_window
        return native.decode_attention(
            group.kernels, q, keys, values, g, tables, BLOCK, group.lengths, window
        )
    assert group.single_places is not None
    keys, values = (
        t.view(rows, -1, g, d).transpose(1, 2)
        for t in cache.read(layer, group.single_places, g * d)
    )
    # The query heads of a group stand in for queries, so keys and values are read once and never
    # repeated.
    out = F.scaled_dot_product_attention(
        q.reshape(rows, g, n // g, d), keys, values, attn_mask=group.single_mask
    )
    return out.reshape(rows, n * d)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    everything = Rows(segments)
    groups = [
        _group(list(same)) for _, same in groupby(segments, lambda s: heads_of(s.weights.config))
    ]
    for s in segments:
        s.weights.wait(0)
    x = _joined([F.embedding(s.token_ids, s.weights.embed) for s in segments])
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
        x = x + _joined(
            [_attention(g, layer, normed[g.rows.start : g.rows.stop], cache) for g in groups]
        )
        normed = everything.norm(x, [w.post_norm for w in weights])
        gates, expert_ids = route_top_k(
            linears(normed, everything.starts, [w.router for w in weights]), pool.top_k
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
            segment.weights.wait(segment.weights.config.experts.num_layers + 1)
        normed = _joined([_last_norm(segment.weights, x) for segment, x in pairs])
        logits = linear(normed, pairs[0][0].weights.head).float()
        found += logits.split([len(x) for _, x in pairs])
    return found


def _last_norm(weights: TenantWeights, x: Tensor) -> Tensor:
    if weights.kernels is not None:
        starts, eps = (
            np.array([0, len(x)]),
            np.array([weights.config.rms_norm_eps], dtype=np.float32),
        )
        return native.rms_norms(weights.kernels, x, starts, [weights.norm], eps)
    return rms_norm(x, weights.norm, weights.config.rms_norm_eps)
