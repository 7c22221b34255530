"""What tenants add to experts that they share, a row at a time, from packed residuals.

Layout of a record: common/plan/residual.py. `parts` says what is in it: int64 [residuals, 3, PARTS,
5] of each part of gate, up and down: bits (1: a sign part, 0: none), size, and the bytes where it,
its v and its u begin.
`numbers`, int32 [rows], is 1 + the residual of each row, 0 for none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_bytes(count, bits):
    """Bytes of a row of codes, a multiple of 4."""
    return (count * bits + 31) // 32 * 4


@triton.jit
def _numbers_of(base, j, width, k, bits, mask):
    """float32 [j, k]: numbers k of the rows j of codes, rows `width` bytes apart."""
    found = tl.zeros(mask.shape, tl.float32)
    line = base + (j * width)[:, None]
    if bits == 32:
        found = tl.load(line.to(tl.pointer_type(tl.float32)) + k[None, :], mask=mask, other=0.0)
    elif bits == 16:
        half = tl.load(line.to(tl.pointer_type(tl.float16)) + k[None, :], mask=mask, other=0.0)
        found = half.to(tl.float32)
    else:
        code = tl.load(line + (k * bits // 8)[None, :], mask=mask, other=0).to(tl.int32)
        most = (1 << bits) - 1
        code = (code >> (k * bits % 8)[None, :].to(tl.int32)) & most.to(tl.int32)
        found = tl.where(mask, code.to(tl.float32) - most.to(tl.float32) / 2, 0.0)
    return found


@triton.jit
def shrink(
    x,
    data,
    parts,
    numbers,
    coefficients,
    K,
    MOST_RANK,
    SHARE: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """coefficients[row, FIRST * PARTS + part, :rank] = scale * (V x), of low-rank parts.

    x: [rows / SHARE, K]; coefficients: float32 [rows, 3 * PARTS, MOST_RANK]. FIRST: the projection
    that the grid's second axis begins with.
    """
    row = tl.program_id(0)
    number = tl.load(numbers + row)
    if number > 0:
        part = FIRST * PARTS + tl.program_id(1)
        entry = parts + ((number - 1).to(tl.int64) * 3 * PARTS + part) * 5
        bits = tl.load(entry)
        rank = tl.load(entry + 1)
        j = tl.program_id(2) * BR + tl.arange(0, BR)
        if (bits > 1) & (tl.program_id(2) * BR < rank):
            record = data + tl.load(entry + 2)
            width = _row_bytes(K, bits)
            total = tl.zeros((BR,), tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                values = tl.load(x + (row // SHARE) * K + k, mask=k < K, other=0.0).to(tl.float32)
                mask = (j < rank)[:, None] & (k < K)[None, :]
                v = _numbers_of(data + tl.load(entry + 3), j, width, k, bits, mask)
                total += tl.sum(v * values[None, :], 1)
            scales = record.to(tl.pointer_type(tl.float32))
            total = total * tl.load(scales + j, mask=j < rank, other=0.0)
            place = coefficients + (row * 3 * PARTS + part) * MOST_RANK
            tl.store(place + j, total, mask=j < rank)


@triton.jit
def _added(
    line,
    data,
    parts,
    number,
    coefficients,
    n,
    N,
    K,
    MOST_RANK,
    PROJECTION: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN]: outputs n of what a residual adds to a row.

    line: the row of x. coefficients: those of the row.
    """
    total = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(PARTS):
        part = PROJECTION * PARTS + i
        entry = parts + ((number - 1).to(tl.int64) * 3 * PARTS + part) * 5
        bits = tl.load(entry)
        size = tl.load(entry + 1)
        record = data + tl.load(entry + 2)
        if bits == 1:
            width = _row_bytes(K, bits)
            codes = record + (2 * tl.cdiv(N, size) + 3) // 4 * 4
            sums = tl.zeros((BN,), tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                values = tl.load(line + k, mask=k < K, other=0.0).to(tl.float32)
                place = (n * width)[:, None] + (k // 8)[None, :]
                mask = (n < N)[:, None] & (k < K)[None, :]
                code = tl.load(codes + place, mask=mask, other=0).to(tl.int32)
                plus = ((code >> (k % 8)[None, :]) & 1) == 1
                sums += tl.sum(tl.where(plus, values[None, :], -values[None, :]), 1)
            scales = record.to(tl.pointer_type(tl.bfloat16))
            total += sums * tl.load(scales + n // size, mask=n < N, other=0.0).to(tl.float32)
        elif bits > 1:
            width = _row_bytes(N, bits)
            codes = data + tl.load(entry + 4)
            for j0 in range(0, size, BR):
                j = j0 + tl.arange(0, BR)
                mask = (j < size)[:, None] & (n < N)[None, :]
                u = _numbers_of(codes, j, width, n, bits, mask)
                t = tl.load(coefficients + part * MOST_RANK + j, mask=j < size, other=0.0)
                total += tl.sum(u * t[:, None], 0)
    return total


@triton.jit
def expand_gated(
    x,
    gate_up,
    inner,
    data,
    parts,
    numbers,
    coefficients,
    N,
    K,
    MOST_RANK,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """inner [rows, N] = silu(gate + residual) * (up + residual). gate_up: [rows, 2 * N]."""
    row = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    kind = inner.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    number = tl.load(numbers + row)
    if number > 0:
        line = x + (row // SHARE) * K
        mine = coefficients + row * 3 * PARTS * MOST_RANK
        gate += _added(line, data, parts, number, mine, n, N, K, MOST_RANK, 0, PARTS, BN, BR, BK)
        up += _added(line, data, parts, number, mine, n, N, K, MOST_RANK, 1, PARTS, BN, BR, BK)
    gate = gate.to(kind).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(inner + row * N + n, (gate * up.to(kind).to(tl.float32)).to(kind), mask=n < N)


@triton.jit
def expand(
    x,
    out,
    data,
    parts,
    numbers,
    coefficients,
    N,
    K,
    MOST_RANK,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """out [rows, N] += what residuals of down add. x: [rows, K]."""
    row = tl.program_id(0)
    number = tl.load(numbers + row)
    if number > 0:
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        mine = coefficients + row * 3 * PARTS * MOST_RANK
        values = tl.load(out + row * N + n, mask=n < N, other=0.0).to(tl.float32)
        values += _added(
            x + row * K, data, parts, number, mine, n, N, K, MOST_RANK, 2, PARTS, BN, BR, BK
        )
        tl.store(out + row * N + n, values.to(out.dtype.element_ty), mask=n < N)
