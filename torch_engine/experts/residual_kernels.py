"""Triton kernels that add residuals to the rows of experts' products, in decode steps and prompts.

Rows lie sorted by slot and residual. A tile is some rows that follow one another and have one
residual: int32 [tiles, 3], its first row, the one behind its last, and 1 + its residual. A program
reads and unpacks its share of a residual's codes once for all rows of a tile, and multiplies on
tensor cores.

Layout of a record: common/plan/residual.py. `parts`, int64 [residuals, 3, PARTS, FIELDS], says what
is in it: bits (1: a sign part, 0: none), size, the bytes where scales, v and u begin (sign: its
codes in place of v), the column where its coefficients begin, and whether it fills them.

Legend: rows M, inputs K, outputs N. `EXACT` as for the kernels of decode steps. Otherwise signs are
multiplied as what rows are, and low-rank parts as TF32. That holds bfloat16, float16 and all codes.
Coefficients, and factors of 32 bits, lose what is below 2^-10 of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(7)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def tile_rows(
    numbers,
    order,
    total,
    tiles,
    TILES,
    ORDERED: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut sorted rows into tiles of at most BM; places behind the last one become empty.

    numbers: of each row, 1 + its residual or 0, which no tile is for. ORDERED: they lie unsorted,
    and sorted row i is order[i]. total: how many rows there are. One program for all.
    """
    count = tl.load(total)
    found = 0
    begun = 0
    for first in range(0, count, BLOCK):
        p = first + tl.arange(0, BLOCK)
        here = p < count
        if ORDERED:
            mine = tl.load(numbers + tl.load(order + p, mask=here, other=0), mask=here, other=0)
            at = tl.load(order + p - 1, mask=here & (p > 0), other=0)
            before = tl.load(numbers + at, mask=here & (p > 0), other=-1)
            at = tl.load(order + p + 1, mask=p + 1 < count, other=0)
            after = tl.load(numbers + at, mask=p + 1 < count, other=-1)
        else:
            mine = tl.load(numbers + p, mask=here, other=0)
            before = tl.load(numbers + p - 1, mask=here & (p > 0), other=-1)
            after = tl.load(numbers + p + 1, mask=p + 1 < count, other=-1)
        run = tl.associative_scan(tl.where(here & (mine != before), p, 0), 0, _larger)
        run = tl.maximum(run, begun)
        opens = here & (mine > 0) & ((p - run) % BM == 0)
        closes = here & (mine > 0) & ((mine != after) | ((p + 1 - run) % BM == 0))
        place = tiles + 3 * (found + tl.cumsum(opens.to(tl.int32), 0) - 1)
        tl.store(place, p, mask=opens)
        tl.store(place + 1, p + 1, mask=closes)
        tl.store(place + 2, mine.to(tl.int32), mask=opens)
        found += tl.sum(opens.to(tl.int32), 0)
        begun = tl.max(run, 0)
    for first in range(found, TILES, BLOCK):
        p = first + tl.arange(0, BLOCK)
        tl.store(tiles + 3 * p + 1, 0, mask=p < TILES)
        tl.store(tiles + 3 * p, 0, mask=p < TILES)


@triton.jit
def _signs(codes, j, rows, k0, count, KIND: tl.constexpr, BK: tl.constexpr):
    """KIND [rows j, BK]: +1 or -1 of the bits from k0 on."""
    width = (count + 31) // 32
    w = k0 // 32 + tl.arange(0, BK // 32)
    mask = (j < rows)[:, None] & (w < width)[None, :]
    bits = tl.load(codes + (j * width)[:, None] + w[None, :], mask=mask, other=0)
    # Each thread unpacks words of its own: bit b goes to the top, shifted by 31 - b in five steps.
    for step in tl.static_range(5):
        bits = tl.join(bits << (16 >> step), bits)
    bits = tl.reshape(bits, (j.shape[0], BK))
    # It becomes the sign of 1.0, which is 0x3F80 in bfloat16; a set bit is plus. Two numbers of 16
    # bits share an operation.
    signs = ((bits >> 16).to(tl.int16) & -0x8000) ^ (0xBF80 - 0x10000)
    return signs.to(tl.int16).to(tl.bfloat16, bitcast=True).to(KIND)


@triton.jit
def _numbers(codes, bits, j, rows, k, count):
    """float32 [rows j, numbers k] of a factor; finite outside of it."""
    width = (count * bits + 31) // 32
    at = k * bits
    mask = (j < rows)[:, None] & (k < count)[None, :]
    words = tl.load(codes + (j * width)[:, None] + (at >> 5)[None, :], mask=mask, other=0)
    code = words >> (at & 31)[None, :]
    # 0x4A800000 is 2^22, whose last bit counts a half: faster than a conversion of integers.
    most = (1 << (bits & 15)) - 1
    number = (((code & most) << 1) | 0x4A800000).to(tl.float32, bitcast=True)
    number = number - (4194304.0 + most.to(tl.float32) / 2)
    half = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    number = tl.where(bits == 16, half, number)
    return tl.where(bits == 32, words.to(tl.float32, bitcast=True), number)


# Numbers that differ between steps and plans are not specialized: few kernels serve them all.
@triton.jit(do_not_specialize=["FIRST", "PARTS", "SHARE", "SPLITS"])
def shrink(
    x,
    data,
    parts,
    tiles,
    order,
    coefficients,
    K,
    ROWS,
    WIDTH,
    FIRST,
    PARTS,
    SPLITS,
    SHARE,
    ORDERED: tl.constexpr,
    EXACT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Products of v with rows of tiles: coefficients float32 [SPLITS, ROWS, WIDTH], rows as sorted.

    Each split has the products of its share of the inputs. x: [ROWS / SHARE, K]; ORDERED: row m of
    a tile reads order[m] / SHARE, else m. Grid: ranks / BR, tiles, parts of the projections from
    FIRST on and their splits.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    tile = tiles + 3 * tl.program_id(1)
    begin = tl.load(tile)
    end = tl.load(tile + 1)
    if begin < end:
        part = FIRST * PARTS + tl.program_id(2) // SPLITS
        split = tl.program_id(2) % SPLITS
        entry = parts + ((tl.load(tile + 2) - 1) * 3 * PARTS + part) * FIELDS
        bits = tl.load(entry).to(tl.int32)
        rank = tl.load(entry + 1).to(tl.int32)
        fills = tl.load(entry + 6)
        first = tl.program_id(0) * BR
        if (bits > 1) & (fills > 0) & (first < rank):
            m = begin + tl.arange(0, BM)
            valid = m < end
            rows = m
            if ORDERED:
                rows = tl.load(order + m, mask=valid, other=0)
            source = x + (rows // SHARE).to(tl.int64) * K
            j = first + tl.arange(0, BR)
            codes = (data + tl.load(entry + 3)).to(tl.pointer_type(tl.int32))
            sums = tl.zeros((BM, BR), tl.float32)
            share = tl.cdiv(K, BK * SPLITS) * BK
            for k0 in range(split * share, tl.minimum(split * share + share, K), BK):
                k = k0 + tl.arange(0, BK)
                mask = valid[:, None] & (k < K)[None, :]
                values = tl.load(source[:, None] + k[None, :], mask=mask, other=0.0)
                v = _numbers(codes, bits, j, rank, k, K)
                sums = tl.dot(values.to(tl.float32), tl.trans(v), sums, input_precision=PRECISION)
            place = coefficients + (split * ROWS + m).to(tl.int64)[:, None] * WIDTH
            place += tl.load(entry + 5) + j[None, :]
            tl.store(place, sums, mask=valid[:, None] & (j < rank)[None, :])


@triton.jit(do_not_specialize=["FIRST", "COUNT", "PARTS", "SHARE"])
def expand(
    x,
    out,
    data,
    parts,
    tiles,
    order,
    coefficients,
    N,
    K,
    WIDTH,
    FIRST,
    COUNT,
    PARTS,
    SHARE,
    ORDERED: tl.constexpr,
    EXACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """out [M, COUNT * N] += what residuals add to COUNT projections from FIRST on, rounded once.

    Grid: outputs / BN, tiles, COUNT. x, rows: as for `shrink`.
    coefficients: float32 [M, WIDTH], the sums of its splits.
    """
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    tile = tiles + 3 * tl.program_id(1)
    begin = tl.load(tile)
    end = tl.load(tile + 1)
    projection = tl.program_id(2)
    entry = parts + ((tl.load(tile + 2) - 1) * 3 + FIRST + projection) * PARTS * FIELDS
    if begin < end:
        if tl.load(entry) > 0:
            m = begin + tl.arange(0, BM)
            valid = m < end
            rows = m
            if ORDERED:
                rows = tl.load(order + m, mask=valid, other=0)
            source = x + (rows // SHARE).to(tl.int64) * K
            n0 = tl.program_id(0) * BN
            n = n0 + tl.arange(0, BN)
            total = tl.zeros((BM, BN), tl.float32)
            # Signs first, then low rank: what one kind needs leaves registers before the other.
            for i in range(PARTS):
                part = entry + i * FIELDS
                if tl.load(part) == 1:
                    KIND: tl.constexpr = tl.float32 if EXACT else x.dtype.element_ty
                    codes = (data + tl.load(part + 3)).to(tl.pointer_type(tl.int32))
                    sums = tl.zeros((BM, BN), tl.float32)
                    for k0 in range(0, K, BK):
                        k = k0 + tl.arange(0, BK)
                        mask = valid[:, None] & (k < K)[None, :]
                        values = tl.load(source[:, None] + k[None, :], mask=mask, other=0.0)
                        signs = tl.trans(_signs(codes, n, N, k0, K, KIND, BK))
                        sums = tl.dot(values.to(KIND), signs, sums, input_precision="ieee")
                    scales = (data + tl.load(part + 2)).to(tl.pointer_type(tl.bfloat16))
                    at = scales + n // tl.load(part + 1).to(tl.int32)
                    total += sums * tl.load(at, mask=n < N, other=0.0).to(tl.float32)[None, :]
            for i in range(PARTS):
                part = entry + i * FIELDS
                bits = tl.load(part).to(tl.int32)
                if bits > 1:
                    size = tl.load(part + 1).to(tl.int32)
                    scales = (data + tl.load(part + 2)).to(tl.pointer_type(tl.float32))
                    codes = (data + tl.load(part + 4)).to(tl.pointer_type(tl.int32))
                    at = coefficients + m.to(tl.int64) * WIDTH + tl.load(part + 5)
                    for j0 in range(0, size, BR):
                        j = j0 + tl.arange(0, BR)
                        mask = valid[:, None] & (j < size)[None, :]
                        t = tl.load(at[:, None] + j[None, :], mask=mask, other=0.0)
                        t *= tl.load(scales + j, mask=j < size, other=0.0)[None, :]
                        u = _numbers(codes, bits, j, size, n, N)
                        total = tl.dot(t, u, total, input_precision=PRECISION)
            width = COUNT * N
            place = out + rows.to(tl.int64)[:, None] * width + projection * N + n[None, :]
            mask = valid[:, None] & (n < N)[None, :]
            values = tl.load(place, mask=mask, other=0.0).to(tl.float32) + total
            tl.store(place, values.to(out.dtype.element_ty), mask=mask)
