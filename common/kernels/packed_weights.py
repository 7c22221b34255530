"""How weights and residuals lie in memory for the kernels. On disk: common/plan/residual.py.

Letters in shapes: K inputs, N outputs, B = ceil(N / 64) blocks of outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 64
"""Outputs in a block of packed weights."""

ACTIVATIONS = {
    "relu": 0,
    "gelu_new": 1,
    "gelu_pytorch_tanh": 1,
    "gelu": 2,
    "silu": 3,
}
"""Numbers of activations in `kernels.h`, by the names in configs."""

TYPES = {"float32": 0, "bfloat16": 1}
"""Numbers of types in `kernels.h`."""

NONE, KINDS = 0, {"sign": 1, "low_rank": 2}
"""Numbers of a residual part's kind in a table; 0: no part."""

FIELDS = 6
"""Fields of a part in a table: kind, bits, size, and the 4-byte words where it and a low-rank
part's v and u begin."""

ALIGNMENT = 16
"""Bytes that a residual's part begins at a multiple of."""


def lanes(itemsize: int) -> int:
    """Inputs whose weights lie side by side: pairs of bfloat16."""
    return 2 if itemsize == 2 else 1


def packed_shape(outputs: int, inputs: int, itemsize: int) -> tuple[int, int, int]:
    """[B, steps of the inputs, 64 * lanes]."""
    width = lanes(itemsize)
    return -(-outputs // BLOCK), -(-inputs // width), BLOCK * width


def pack(weight: np.ndarray) -> np.ndarray:
    """Float32 [..., N, K] -> [..., B, K, 64]; 2-byte types -> [..., B, ceil(K / 2), 128].

    Output n's pair of inputs lies at 2 * (n % 64). Zeros are behind output N, and behind an odd K.
    """
    *stack, outputs, inputs = weight.shape
    blocks, steps, _ = packed_shape(outputs, inputs, weight.itemsize)
    width = lanes(weight.itemsize)
    padding = [(0, blocks * BLOCK - outputs), (0, steps * width - inputs)]
    padded = np.pad(weight, [(0, 0)] * len(stack) + padding)
    cells = padded.reshape(*stack, blocks, BLOCK, steps, width).swapaxes(-3, -2)
    return np.ascontiguousarray(cells).reshape(*stack, blocks, steps, BLOCK * width)


def unpack(packed: np.ndarray, outputs: int, inputs: int) -> np.ndarray:
    """What was packed: [..., N, K]."""
    *stack, blocks, steps, size = packed.shape
    cells = packed.reshape(*stack, blocks, steps, BLOCK, size // BLOCK).swapaxes(-3, -2)
    rows = cells.reshape(*stack, blocks * BLOCK, steps * (size // BLOCK))
    return rows[..., :outputs, :inputs]


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of a residual's codes, padded to a multiple of 4."""
    return -(-count * bits // 32) * 4


def blocked_sign(data: np.ndarray, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """A sign part for the kernels: its scales, then uint64 [B, K].

    Bit i of a word is that of the block's output i. As many bytes as before, but that outputs are
    padded to whole blocks.

    Args:
        data: uint8 [bytes], the scales, then a bit for each weight, [N, K].
        size: outputs that share a scale.
    """
    outputs, inputs = shape
    start, width = row_bytes(-(-outputs // size), 16), row_bytes(inputs, 1)
    blocks, groups = -(-outputs // BLOCK), -(-inputs // 64)
    padded = np.zeros((blocks * BLOCK, groups * 8), dtype=np.uint8)
    padded[:outputs, :width] = data[start : start + outputs * width].reshape(outputs, width)
    bits = padded.view("<u8").reshape(blocks, BLOCK, groups)
    # Squares of 64 x 64 bits are transposed by exchanging ever smaller quarters (Hacker's Delight,
    # section 7-3).
    for half in (32, 16, 8, 4, 2, 1):
        low = np.uint64(sum(1 << i for i in range(64) if not i & half))
        pairs = bits.reshape(blocks, 64 // (2 * half), 2, half, groups)
        upper, lower = pairs[:, :, 0], pairs[:, :, 1]
        moved = ((upper >> np.uint64(half)) ^ lower) & low
        lower ^= moved
        upper ^= moved << np.uint64(half)
    codes = np.ascontiguousarray(bits.swapaxes(1, 2).reshape(blocks, groups * 64)[:, :inputs])
    return np.concatenate([data[:start], codes.reshape(-1).view(np.uint8)])


def part_fields(
    kind: str, bits: int, size: int, inputs: int, starts: Sequence[int], like: int | None
) -> tuple[int, ...]:
    """What a table says of a part.

    Args:
        inputs: of its matrix.
        starts: words where the record's parts begin, this one's last.
        like: number of the part whose v this one has.
    """
    start = starts[-1]
    if kind == "sign":
        return KINDS[kind], bits, size, start, 0, 0
    own = like is None
    v = size + (start if like is None else starts[like])
    u = start + size + (size * row_bytes(inputs, bits) // 4 if own else 0)
    return KINDS[kind], bits, size, start, v, u


def blocked_part(data: np.ndarray, kind: str, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """A residual's part as the kernels read it, uint8 [bytes, a multiple of 16].

    Args:
        data: uint8, the part's bytes as the store has them.
        kind: one of `KINDS`.
        size: outputs that share a scale, or the rank.
    """
    if kind == "sign":
        data = blocked_sign(data, size, shape)
    return np.concatenate([data, np.zeros(-len(data) % ALIGNMENT, dtype=np.uint8)])
