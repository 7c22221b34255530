"""Embeddings, sums, norms and activations of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_engine.decode.kernels.addresses import weights_of


@triton.jit
def embed(
    ids,
    tenants,
    table,
    x,
    scale,
    H,
    BLOCK: tl.constexpr,
):
    """x [M, H] = scale * embedding of each row's tenant. tenants: int32 [M], -1 of padding."""
    row = tl.program_id(0)
    tenant = tl.load(tenants + row)
    if tenant >= 0:
        h = tl.arange(0, BLOCK)
        base = weights_of(table, tenant, x) + tl.load(ids + row).to(tl.int64) * H
        found = tl.load(base + h, mask=h < H, other=0.0).to(tl.float32) * scale
        tl.store(x + row * H + h, found.to(x.dtype.element_ty), mask=h < H)


@triton.jit
def add_norm(
    x,
    added,
    gates,
    tenants,
    table,
    normed,
    scale,
    eps,
    H,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [M, H] += scale * what a layer's part gave; normed [M, H]: its RMS norm.

    added: [M, H] with TOP 1, else experts' outputs [M * TOP, H], weighed by gates float32
    [M * TOP]; nothing with TOP 0.
    """
    row = tl.program_id(0)
    tenant = tl.load(tenants + row)
    if tenant >= 0:
        kind = x.dtype.element_ty
        h = tl.arange(0, BLOCK)
        mask = h < H
        values = tl.load(x + row * H + h, mask=mask, other=0.0).to(tl.float32)
        if TOP > 0:
            total = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(TOP):
                part = tl.load(added + (row * TOP + i) * H + h, mask=mask, other=0.0)
                if TOP > 1:
                    gate = tl.load(gates + row * TOP + i).to(kind).to(tl.float32)
                    part = (part.to(tl.float32) * gate).to(kind)
                total += part.to(tl.float32)
            total = total.to(kind).to(tl.float32)
            total = (total * scale).to(kind).to(tl.float32)
            values = (values + total).to(kind)
            tl.store(x + row * H + h, values, mask=mask)
            values = values.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, 0) / H + eps)
        weight = tl.load(weights_of(table, tenant, x) + h, mask=mask, other=0.0).to(tl.float32)
        out = (values * inverse).to(kind).to(tl.float32) * weight
        tl.store(normed + row * H + h, out.to(kind), mask=mask)


@triton.jit
def activate(
    gate_up,
    inner,
    N,
    BLOCK: tl.constexpr,
):
    """inner [rows, N] = silu(gate) * up. gate_up: [rows, 2 * N]. Grid: rows, outputs / BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    kind = inner.dtype.element_ty
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(inner + row * N + n, (gate * up).to(kind), mask=n < N)
