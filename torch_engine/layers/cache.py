"""Keys and values of all sequences, in blocks of one arena.

Sequences come, grow and go in any order, and of any tenant; blocks keep what they leave behind
usable, as in "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import EngineError
from common.families.shape import Decoder
from common.serving.block_pool import BlockPool
from common.units import format_bytes
from torch_engine.device import free_cache_bytes
from torch_engine.options import TorchOptions

BLOCK = 16  # tokens
MAX_CONTEXTS = 64  # more whole contexts of a tenant than that at once are of no use


def token_width(shape: Decoder) -> int:
    """Elements of a token's keys in one layer."""
    return shape.attention.kv_heads * shape.attention.head_dim


class Blocks:
    """Which blocks of a sequence's cache lie where. table: int64, of which the first `count` are
    block numbers."""

    def __init__(self) -> None:
        self.table = np.zeros(8, dtype=np.int64)
        self.count = 0

    def add(self, block: int) -> None:
        if self.count == len(self.table):
            self.table = np.concatenate((self.table, np.zeros_like(self.table)))
        self.table[self.count] = block
        self.count += 1

    @property
    def numbers(self) -> list[int]:
        numbers: list[int] = self.table[: self.count].tolist()
        return numbers

    def places(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: where in the arena these positions lie, in tokens."""
        positions = np.arange(start, stop)
        found: np.ndarray = self.table[positions // BLOCK] * BLOCK + positions % BLOCK
        return found


class Arena:
    """For each layer keys and values [tokens, width]; a tenant with narrower heads uses the first
    columns.

    Filled with zeros, so that what is masked is finite. On a CPU pages are taken from the system
    when they are used. pool: who has which blocks.
    """

    def __init__(
        self, num_layers: int, width: int, pool: BlockPool, dtype: torch.dtype, device: torch.device
    ):
        self.pool = pool
        shape = (pool.num_blocks * BLOCK, width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.block_bytes = block_bytes(num_layers, width, dtype)

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        """Of blocks that sequences have."""
        return (self.num_blocks - self.pool.free) * self.block_bytes

    @property
    def cached_bytes(self) -> int:
        """Of blocks that no sequence has and that can be found again."""
        return self.pool.cached * self.block_bytes

    @staticmethod
    def needed(blocks: Blocks, length: int) -> int:
        """Blocks that a sequence lacks to hold `length` tokens."""
        return max(0, -(-length // BLOCK) - blocks.count)

    def reserve(self, blocks: Blocks, length: int) -> None:
        """Give a sequence room for `length` tokens. There must be: see `BlockPool.free`."""
        for _ in range(self.needed(blocks, length)):
            blocks.add(self.pool.take())

    def release(self, blocks: Blocks) -> None:
        """Take a sequence's blocks back."""
        self.pool.release(blocks.numbers)
        blocks.count = 0

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values: [T, width of the tenant] to int64 [T]."""
        width = keys.shape[1]
        self.keys[layer][:, :width].index_copy_(0, places, keys)
        self.values[layer][:, :width].index_copy_(0, places, values)

    def read(self, layer: int, places: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values [*places.shape, width]."""
        flat = places.reshape(-1)
        shape = (*places.shape, width)
        keys = self.keys[layer][:, :width].index_select(0, flat).view(shape)
        return keys, self.values[layer][:, :width].index_select(0, flat).view(shape)

    def close(self) -> None:
        self.keys.clear()
        self.values.clear()


def make_arena(
    shapes: Sequence[Decoder], options: TorchOptions, dtype: torch.dtype, device: torch.device
) -> Arena:
    """As large as is asked for, or as the device's memory is. Raises EngineError."""
    layers, width = len(shapes[0].layers), max(token_width(s) for s in shapes)
    one = block_bytes(layers, width, dtype)
    nbytes = options.kv_cache_bytes
    if nbytes is None:
        most = sum(-(-s.max_positions // BLOCK) for s in shapes) * MAX_CONTEXTS
        nbytes = min(free_cache_bytes(device), most * one)
    if nbytes < one:
        raise EngineError(
            f"kv_cache_bytes is {format_bytes(nbytes)}, a block of {BLOCK} tokens takes "
            f"{format_bytes(one)}; "
            "give at least that, and enough for the longest sequence"
        )
    pool = BlockPool(nbytes // one, BLOCK, options.enable_prefix_caching)
    return Arena(layers, width, pool, dtype, device)


def block_bytes(num_layers: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers."""
    return 2 * num_layers * BLOCK * width * dtype.itemsize


def padded_tables(blocks: Sequence[Blocks]) -> np.ndarray:
    """int64 [rows, most blocks] of several sequences; what a row has no block for names block 0."""
    width = max(b.count for b in blocks)
    found = np.zeros((len(blocks), width), dtype=np.int64)
    for i, b in enumerate(blocks):
        found[i, : b.count] = b.table[: b.count]
    return found
