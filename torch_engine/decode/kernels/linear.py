"""Products of rows with matrices of their tenants, or of their experts."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_engine.decode.kernels.addresses import weights_of


@triton.jit
def linear(
    x,
    out,
    table,
    columns,
    order,
    starts,
    N,
    K,
    SHARE: tl.constexpr,
    SORTED: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Rows of each group times its matrix: out [rows, N] = x W^T, or silu(x G^T) * (x U^T).

    starts: int32 [G + 1], where each group's rows begin. SORTED: the rows are order[...], int32,
    and a row of out reads row / SHARE of x; else they are adjacent. columns: int32 [G], each
    group's place in the table; with SORTED it is the group. W: [N, K]; gated: [2 * N, K].
    """
    group = tl.program_id(1)
    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    if begin < end:
        column = group
        if not SORTED:
            column = tl.load(columns + group)
        kind = out.dtype.element_ty
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        base = weights_of(table, column, x) + n.to(tl.int64)[:, None] * K
        for first in range(begin, end, BM):
            m = first + tl.arange(0, BM)
            valid = m < end
            rows = m
            if SORTED:
                rows = tl.load(order + m, mask=valid, other=0)
            source = x + (rows // SHARE).to(tl.int64)[:, None] * K
            sums = tl.zeros((BM, BN), tl.float32)
            ups = tl.zeros((BM, BN), tl.float32)
            for k0 in range(0, K, BK):
                kk = k0 + k
                values = tl.load(
                    source + kk[None, :], mask=valid[:, None] & (kk < K)[None, :], other=0.0
                )
                inside = (n < N)[:, None] & (kk < K)[None, :]
                w = tl.load(base + kk[None, :], mask=inside, other=0.0)
                if EXACT:
                    values = values.to(tl.float32)
                    w = w.to(tl.float32)
                sums = tl.dot(values, tl.trans(w), sums, input_precision="ieee")
                if GATED:
                    u = tl.load(base + N.to(tl.int64) * K + kk[None, :], mask=inside, other=0.0)
                    if EXACT:
                        u = u.to(tl.float32)
                    ups = tl.dot(values, tl.trans(u), ups, input_precision="ieee")
            if GATED:
                gate = sums.to(kind).to(tl.float32)
                gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
                sums = gate * ups.to(kind).to(tl.float32)
            place = out + rows.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(place, sums.to(kind), mask=valid[:, None] & (n < N)[None, :])
