"""Attention of one new token a row, over keys and values in pages."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_engine.decode.kernels.addresses import weights_of


@triton.jit
def _head_norm(values, squares, width, weight, eps, kind):
    """RMS norm of a head, given the sum of squares of what it is normed with."""
    inverse = tl.rsqrt(squares / width + eps)
    return ((values * inverse).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)


@triton.jit
def rotate_and_keep(
    qkv,
    q,
    keys,
    values,
    tenants,
    positions,
    places,
    cos_table,
    sin_table,
    q_norms,
    k_norms,
    eps,
    clip,
    stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Norm and turn queries and keys; keys and values go into the cache.

    qkv: [M, (HEADS + 2 * KV_HEADS) * D]; q: [M, HEADS * D]; cache: [tokens, stride]. places: int32
    [M], the token's row in the cache. NORM: 0 none, 1 each head, 2 the whole projection, of WHOLE
    (padded) numbers. HALF: D / 2, padded. cos, sin: [positions, D / 2] a tenant.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    tenant = tl.load(tenants + row)
    if tenant >= 0:
        kind = qkv.dtype.element_ty
        half: tl.constexpr = D // 2
        i = tl.arange(0, HALF)
        mask = i < half
        line = qkv + row * (HEADS + 2 * KV_HEADS) * D
        first = tl.load(line + head * D + i, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(line + head * D + half + i, mask=mask, other=0.0).to(tl.float32)
        is_query = head < HEADS
        if (NORM > 0) & (head < HEADS + KV_HEADS):
            base = weights_of(k_norms, tenant, qkv)
            if is_query:
                base = weights_of(q_norms, tenant, qkv)
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            width = D
            if NORM == 2:
                w = tl.arange(0, WHOLE)
                width = tl.where(is_query, HEADS * D, KV_HEADS * D)
                start = tl.where(is_query, 0, HEADS * D)
                all_of = tl.load(line + start + w, mask=w < width, other=0.0).to(tl.float32)
                squares = tl.sum(all_of * all_of, 0)
                base += tl.where(is_query, head, head - HEADS) * D
            weight = tl.load(base + i, mask=mask, other=0.0).to(tl.float32)
            first = _head_norm(first, squares, width, weight, eps, kind)
            weight = tl.load(base + half + i, mask=mask, other=0.0).to(tl.float32)
            second = _head_norm(second, squares, width, weight, eps, kind)
        if CLIP:
            first = tl.minimum(tl.maximum(first, -clip), clip).to(kind).to(tl.float32)
            second = tl.minimum(tl.maximum(second, -clip), clip).to(kind).to(tl.float32)
        if head < HEADS + KV_HEADS:
            at = tl.load(positions + row).to(tl.int64) * half
            c = tl.load(weights_of(cos_table, tenant, qkv) + at + i, mask=mask, other=0.0)
            s = tl.load(weights_of(sin_table, tenant, qkv) + at + i, mask=mask, other=0.0)
            c = c.to(tl.float32)
            s = s.to(tl.float32)
            a = (first * c).to(kind).to(tl.float32) - (second * s).to(kind).to(tl.float32)
            b = (second * c).to(kind).to(tl.float32) + (first * s).to(kind).to(tl.float32)
            first = a
            second = b
        if is_query:
            out = q + row * HEADS * D + head * D
        else:
            place = tl.load(places + row).to(tl.int64) * stride
            if head < HEADS + KV_HEADS:
                out = keys + place + (head - HEADS) * D
            else:
                out = values + place + (head - HEADS - KV_HEADS) * D
        tl.store(out + i, first.to(kind), mask=mask)
        tl.store(out + half + i, second.to(kind), mask=mask)


@triton.jit
def attend(
    q,
    keys,
    values,
    blocks,
    lengths,
    parts,
    weights,
    scale,
    stride,
    blocks_stride,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    EXACT: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
):
    """Softmax of a part of a row's keys, for the SHARED query heads of one key-value head.

    blocks: int32 [M, blocks_stride], the row's blocks in the cache. lengths: int32 [M], 0 of
    padding. parts: float32 [M, heads, SPLITS, D]; weights: float32 [M, heads, SPLITS], the log of
    each part's sum. As in FlashDecoding, with pages.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    if length > 0:
        start = 0
        if WINDOW > 0:
            start = tl.maximum(length - WINDOW, 0)
        each = tl.cdiv(tl.cdiv(length - start, BK), SPLITS) * BK
        low = start + split * each
        high = tl.minimum(length, low + each)
        r = tl.arange(0, RP)
        d = tl.arange(0, DP)
        p = tl.arange(0, BK)
        line = q + ((row * KV_HEADS + head) * SHARED + r)[:, None] * D
        queries = tl.load(
            line + d[None, :], mask=(r < SHARED)[:, None] & (d < D)[None, :], other=0.0
        )
        highest = tl.full((RP,), -float("inf"), tl.float32)
        total = tl.zeros((RP,), tl.float32)
        sums = tl.zeros((RP, DP), tl.float32)
        for first in range(low, high, BK):
            at = first + p
            seen = at < high
            block = tl.load(blocks + row * blocks_stride + at // BLOCK, mask=seen, other=0)
            place = (block.to(tl.int64) * BLOCK + at % BLOCK) * stride + head * D
            inside = seen[:, None] & (d < D)[None, :]
            k = tl.load(keys + place[:, None] + d[None, :], mask=inside, other=0.0)
            v = tl.load(values + place[:, None] + d[None, :], mask=inside, other=0.0)
            if EXACT:
                scores = tl.dot(
                    queries.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee"
                )
            else:
                scores = tl.dot(queries, tl.trans(k))
            scores = tl.where(seen[None, :], scores * scale, -float("inf"))
            now = tl.maximum(highest, tl.max(scores, 1))
            e = tl.exp(scores - now[:, None])
            shrink = tl.exp(highest - now)
            total = total * shrink + tl.sum(e, 1)
            sums = sums * shrink[:, None]
            if EXACT:
                sums = tl.dot(e, v.to(tl.float32), sums, input_precision="ieee")
            else:
                sums = tl.dot(e.to(v.dtype), v, sums)
            highest = now
        some = total > 0
        place = ((row * KV_HEADS + head) * SHARED + r) * SPLITS + split
        sums = sums / tl.where(some, total, 1.0)[:, None]
        tl.store(
            parts + place[:, None] * D + d[None, :],
            sums,
            mask=(r < SHARED)[:, None] & (d < D)[None, :],
        )
        log = tl.where(some, highest + tl.log(tl.where(some, total, 1.0)), -float("inf"))
        tl.store(weights + place, log, mask=r < SHARED)


@triton.jit
def merge(
    parts,
    weights,
    lengths,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of `attend` as one: out [M, HEADS * D]."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(lengths + row) > 0:
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, DP)
        place = (row * HEADS + head) * SPLITS + s
        logs = tl.load(weights + place)
        share = tl.exp(logs - tl.max(logs, 0))
        share = share / tl.sum(share, 0)
        values = tl.load(parts + place[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        found = tl.sum(values * share[:, None], 0)
        tl.store(out + (row * HEADS + head) * D + d, found.to(out.dtype.element_ty), mask=d < D)
