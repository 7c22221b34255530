"""KV caches: arrays for each tenant, in which each of its sequences has a row.

The arrays hold a power of two of sequences, with answers and prompts of a size of `steps.buckets`.
So steps are compiled for few shapes. A sequence that begins takes a free row, without a copy of the
others. Arrays that are full, or too short, are exchanged for larger ones, one layer after the
other. Arrays that have become too large are exchanged after a while, and at once where memory is
short. Those without any sequence are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from common.dtypes import BY_NAME
from jax_engine.layers.attention import KeyValues
from jax_engine.steps.compilation import CountedJit

PATIENCE = 16
"""Steps for which arrays are kept that are twice as large as they need to be."""

IDS, OFFSET, LIVE, PROMPT = range(4)
"""Columns of what a decoded row is told by: its token, the token's offset in the cache, whether
the row takes part, and the length of its prompt."""


@dataclass(frozen=True)
class CacheSize:
    """Sizes of a tenant's arrays: sequences, tokens of an answer, tokens of a prompt."""

    rows: int = 0
    answer: int = 0
    prompt: int = 0

    def __or__(self, other: CacheSize) -> CacheSize:
        """What holds either."""
        return CacheSize(
            max(self.rows, other.rows),
            max(self.answer, other.answer),
            max(self.prompt, other.prompt),
        )


@dataclass(frozen=True)
class CacheLayout:
    """What a tenant's shape makes of its arrays, each [rows, heads, tokens, head_dim]: four a
    decoder layer."""

    layers: int
    heads: int
    head_dim: int
    dtype: str

    def nbytes(self, size: CacheSize) -> int:
        """Bytes of a tenant's arrays."""
        tokens = size.rows * (size.answer + size.prompt)
        return tokens * self.layers * 2 * self.heads * self.head_dim * BY_NAME[self.dtype].itemsize


class CacheCalls:
    """What is compiled for caches."""

    def __init__(self, jit: CountedJit, by_row: Callable[[np.ndarray], Array]):
        """by_row: puts an array onto the device, rows along the mesh's data axis."""
        self._by_row = by_row
        self.insert = jit("insert", _insert, donate_argnums=0)
        self.move = jit("move", _move, static_argnums=2)

    def zeros(self, layout: CacheLayout, rows: int, tokens: int) -> KeyValues:
        """Keys and values of a layer, all 0."""
        dims = (rows, layout.heads, tokens, layout.head_dim)
        empty = np.zeros(dims, dtype=BY_NAME[layout.dtype])
        # These are donated later: never a view of numpy's memory.
        return jnp.array(self._by_row(empty), copy=True), jnp.array(self._by_row(empty), copy=True)


def _insert(into: KeyValues, values: KeyValues, rows: Array, count: Array) -> KeyValues:
    """Put the first `count` rows of [B, N, t, D] at `rows` of [R, N, T, D], t <= T."""

    def put(i: Array, held: KeyValues) -> KeyValues:
        zero = jnp.zeros_like(rows[i])
        one = [
            lax.dynamic_slice_in_dim(v, i, 1).astype(h.dtype)
            for h, v in zip(held, values, strict=True)
        ]
        k, v = (
            lax.dynamic_update_slice(h, r, (rows[i], zero, zero, zero))
            for h, r in zip(held, one, strict=True)
        )
        return k, v

    done: KeyValues = lax.fori_loop(0, count, put, into)
    return done


def _move(held: KeyValues, rows: Array, tokens: int) -> KeyValues:
    """These rows of [R, N, T, D], cut or filled up to so many tokens."""

    def one(array: Array) -> Array:
        taken = jnp.take(array[:, :, :tokens], rows, axis=0)
        return jnp.pad(taken, [(0, 0), (0, 0), (0, tokens - taken.shape[2]), (0, 0)])

    return one(held[0]), one(held[1])


class TenantKVCache:
    """The caches of one tenant's sequences.

    cache, encoded: for each decoder layer keys and values of the answer [R, N, L, D], and of the
        prompt [R, N, S, D].
    lengths, prompts: int32 [R], tokens in them.
    numbers: int64 [R], the sequence of each row, -1 where there is none.
    """

    def __init__(self, layout: CacheLayout, calls: CacheCalls):
        self.layout, self._calls = layout, calls
        self.size = CacheSize()
        self.cache: list[KeyValues] = []
        self.encoded: list[KeyValues] = []
        self.lengths = np.zeros(0, np.int32)
        self.prompts = np.zeros(0, np.int32)
        self.numbers = np.zeros(0, np.int64)
        self._oversize = 0

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes(self.size)

    @property
    def is_empty(self) -> bool:
        return not (self.numbers >= 0).any()

    def row_of(self, number: int) -> int:
        """The row of a sequence."""
        return int(np.flatnonzero(self.numbers == number)[0])

    def length_of(self, number: int) -> int:
        """Tokens in a sequence's cache."""
        return int(self.lengths[self.row_of(number)])

    def extend(self, number: int, tokens: int) -> None:
        """So many tokens more were put into a sequence's cache."""
        self.lengths[self.row_of(number)] += tokens

    def next_size(self, needed: CacheSize) -> CacheSize:
        """What to have for a step that needs so much: no less than now, unless it was twice the
        need for long."""
        larger = self.size | needed
        if 2 * self.layout.nbytes(needed) > self.layout.nbytes(larger):
            self._oversize = 0
            return larger
        self._oversize += 1
        return needed if self._oversize > PATIENCE else larger

    def adopt(self, encoded: list[KeyValues], answer: int) -> None:
        """Without any sequence: the arrays of prompts just read become those kept."""
        assert self.is_empty
        rows, _, prompt, _ = encoded[0][0].shape
        self.size, self.encoded = CacheSize(rows, answer, prompt), encoded
        self.cache = [self._calls.zeros(self.layout, rows, answer) for _ in encoded]
        self._resize_host(np.zeros(0, np.int64))

    def _resize_host(self, kept: np.ndarray) -> None:
        """Host arrays for the size, with these rows first."""
        for name, value in (("lengths", 0), ("prompts", 0), ("numbers", -1)):
            old = getattr(self, name)
            new = np.full(self.size.rows, value, old.dtype)
            new[: len(kept)] = old[kept]
            setattr(self, name, new)
        self._oversize = 0

    def resize(self, size: CacheSize) -> None:
        """Move to arrays of these sizes, which hold all that is there."""
        if size == self.size:
            return
        before, self.size = self.size, size
        kept = np.flatnonzero(self.numbers >= 0)
        if size.rows >= before.rows:  # rows stay
            kept = np.arange(before.rows)
        layers = range(self.layout.layers)
        if not self.cache:
            self.cache = [self._calls.zeros(self.layout, size.rows, size.answer) for _ in layers]
            self.encoded = [self._calls.zeros(self.layout, size.rows, size.prompt) for _ in layers]
        else:
            rows = np.zeros(size.rows, np.int32)
            rows[: len(kept)] = kept
            for n in layers:
                if (before.rows, before.answer) != (size.rows, size.answer):
                    self.cache[n] = self._calls.move(self.cache[n], rows, size.answer)
                if (before.rows, before.prompt) != (size.rows, size.prompt):
                    self.encoded[n] = self._calls.move(self.encoded[n], rows, size.prompt)
        self._resize_host(kept)

    def add(self, numbers: Sequence[int], prompts: Sequence[int]) -> np.ndarray:
        """Free rows for sequences with prompts of these lengths: int32 [sequences]."""
        rows = np.flatnonzero(self.numbers < 0)[: len(numbers)].astype(np.int32)
        assert len(rows) == len(numbers), "the arrays were made too small"
        self.numbers[rows], self.prompts[rows], self.lengths[rows] = numbers, prompts, 0
        return rows

    def write(
        self, kind: Literal["cache", "encoded"], values: Sequence[KeyValues], rows: np.ndarray
    ) -> None:
        """Copy the first rows of each layer's keys and values to these rows, int32 [sequences]."""
        held: list[KeyValues] = getattr(self, kind)
        padded = np.zeros(values[0][0].shape[0], np.int32)
        padded[: len(rows)] = rows
        for n in range(len(held)):
            held[n] = self._calls.insert(held[n], values[n], padded, np.int32(len(rows)))

    def remove(self, number: int) -> None:
        """Free a sequence's row, and with the last one all memory."""
        self.numbers[self.numbers == number] = -1
        if self.is_empty:
            self.free()

    def free(self) -> None:
        """Free all memory."""
        self.size, self.cache, self.encoded = CacheSize(), [], []
        self._resize_host(np.zeros(0, np.int64))

    def table(self, tokens: dict[int, int]) -> np.ndarray:
        """int32 [R, 4] for a step in which these sequences get these tokens, see `IDS`."""
        found = np.zeros((self.size.rows, 4), np.int32)
        for number, token in tokens.items():
            row = self.row_of(number)
            found[row] = (token, self.lengths[row], 1, self.prompts[row])
        return found
