"""Caches: a lane for each tenant, with places for its sequences.

The arrays of a lane have room for a power of two of sequences, with caches and prompts of a size of
`steps.buckets`, so that steps are compiled for few shapes. A sequence that begins takes a free
place, without a copy of the others; a lane that is full, or too short, moves to larger arrays, one
layer after the other. Arrays that have become too large for what is in them are given up after a
while, and at once where memory is short; those of an empty lane are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from common.dtypes import BY_NAME
from jax_engine.models.encoder_decoder import KeyValues
from jax_engine.steps.compiled import Compiled

Array = jax.Array

PATIENCE = 16
"""Steps for which a lane keeps arrays that are twice as large as it needs."""


@dataclass(frozen=True)
class Room:
    """Sizes of a lane's arrays: sequences, tokens of an answer, tokens of a prompt."""

    rows: int = 0
    cache: int = 0
    prompt: int = 0

    def __or__(self, other: Room) -> Room:
        """Room for what either holds."""
        return Room(
            max(self.rows, other.rows), max(self.cache, other.cache), max(self.prompt, other.prompt)
        )


@dataclass(frozen=True)
class Form:
    """What a tenant's config makes of a lane's arrays, each [rows, heads, tokens, head_dim]: four a
    decoder layer."""

    layers: int
    heads: int
    head_dim: int
    dtype: str

    def nbytes(self, room: Room) -> int:
        """Bytes of a lane's arrays."""
        tokens = room.rows * (room.cache + room.prompt)
        return tokens * self.layers * 2 * self.heads * self.head_dim * BY_NAME[self.dtype].itemsize


class LaneCalls:
    """What lanes compile. by_row: puts an array onto the device, rows along the mesh's data
    axis."""

    def __init__(self, compiled: Compiled, by_row: Callable[[np.ndarray], Array]):
        self._by_row = by_row
        self.insert = compiled("insert", _insert, donate_argnums=0)
        self.move = compiled("move", _move, static_argnums=2)

    def zeros(self, form: Form, rows: int, tokens: int) -> KeyValues:
        empty = np.zeros((rows, form.heads, tokens, form.head_dim), dtype=BY_NAME[form.dtype])
        # These are donated later: never a view of numpy's memory.
        return jnp.array(self._by_row(empty), copy=True), jnp.array(self._by_row(empty), copy=True)


def _insert(into: KeyValues, rows: KeyValues, places: Array, count: Array) -> KeyValues:
    """Put the first `count` rows of [B, N, t, D] at `places` of [R, N, T, D], t <= T."""

    def put(i: Array, held: KeyValues) -> KeyValues:
        zero = jnp.zeros_like(places[i])
        one = [
            lax.dynamic_slice_in_dim(r, i, 1).astype(h.dtype)
            for h, r in zip(held, rows, strict=True)
        ]
        k, v = (
            lax.dynamic_update_slice(h, r, (places[i], zero, zero, zero))
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


class Lane:
    """The caches of one tenant's sequences.

    cache, encoded: for each decoder layer keys and values of the answer [R, N, L, D], and of the
        prompt [R, N, S, D].
    lengths, prompts: int32 [R], tokens in them. numbers: the sequence at each place, -1 where there
        is none.
    """

    def __init__(self, form: Form, calls: LaneCalls):
        self.form, self._calls = form, calls
        self.room = Room()
        self.cache: list[KeyValues] = []
        self.encoded: list[KeyValues] = []
        self.lengths = np.zeros(0, np.int32)
        self.prompts = np.zeros(0, np.int32)
        self.numbers = np.zeros(0, np.int64)
        self._oversize = 0

    @property
    def nbytes(self) -> int:
        return self.form.nbytes(self.room)

    @property
    def is_empty(self) -> bool:
        return not (self.numbers >= 0).any()

    def place_of(self, number: int) -> int:
        return int(np.flatnonzero(self.numbers == number)[0])

    def length_of(self, number: int) -> int:
        """Tokens in a sequence's cache."""
        return int(self.lengths[self.place_of(number)])

    def add(self, number: int, tokens: int) -> None:
        """So many tokens more were put into a sequence's cache."""
        self.lengths[self.place_of(number)] += tokens

    def next_room(self, needed: Room) -> Room:
        """What to have for a step that needs so much: no less than now, unless twice the need was
        had for long."""
        larger = self.room | needed
        if 2 * self.form.nbytes(needed) > self.form.nbytes(larger):
            self._oversize = 0
            return larger
        self._oversize += 1
        return needed if self._oversize > PATIENCE else larger

    def take_over(self, encoded: list[KeyValues], cache: int) -> None:
        """Without any sequence: the arrays of prompts just read become the lane's own."""
        assert self.is_empty
        rows, _, prompt, _ = encoded[0][0].shape
        self.room, self.encoded = Room(rows, cache, prompt), encoded
        self.cache = [self._calls.zeros(self.form, rows, cache) for _ in encoded]
        self._resize(np.zeros(0, np.int64))

    def _resize(self, kept: np.ndarray) -> None:
        """Host arrays for the room, with these places first."""
        for name, value in (("lengths", 0), ("prompts", 0), ("numbers", -1)):
            old = getattr(self, name)
            new = np.full(self.room.rows, value, old.dtype)
            new[: len(kept)] = old[kept]
            setattr(self, name, new)
        self._oversize = 0

    def fit(self, room: Room) -> None:
        """Move to arrays of these sizes, which hold all that is there."""
        if room == self.room:
            return
        before, self.room = self.room, room
        kept = np.flatnonzero(self.numbers >= 0)
        if room.rows >= before.rows:  # places stay
            kept = np.arange(before.rows)
        if not self.cache:
            self.cache = [
                self._calls.zeros(self.form, room.rows, room.cache) for _ in range(self.form.layers)
            ]
            self.encoded = [
                self._calls.zeros(self.form, room.rows, room.prompt)
                for _ in range(self.form.layers)
            ]
        else:
            rows = np.zeros(room.rows, np.int32)
            rows[: len(kept)] = kept
            for n in range(self.form.layers):
                if (before.rows, before.cache) != (room.rows, room.cache):
                    self.cache[n] = self._calls.move(self.cache[n], rows, room.cache)
                if (before.rows, before.prompt) != (room.rows, room.prompt):
                    self.encoded[n] = self._calls.move(self.encoded[n], rows, room.prompt)
        self._resize(kept)

    def enter(self, numbers: Sequence[int], prompts: Sequence[int]) -> np.ndarray:
        """Free places for sequences with prompts of these lengths: int32 [sequences]."""
        places = np.flatnonzero(self.numbers < 0)[: len(numbers)].astype(np.int32)
        assert len(places) == len(numbers), "the lane was made too small"
        self.numbers[places], self.prompts[places], self.lengths[places] = numbers, prompts, 0
        return places

    def put(
        self, kind: Literal["cache", "encoded"], rows: Sequence[KeyValues], places: np.ndarray
    ) -> None:
        """Copy the first rows of each layer's keys and values to these places, int32 [rows]."""
        held: list[KeyValues] = getattr(self, kind)
        padded = np.zeros(rows[0][0].shape[0], np.int32)
        padded[: len(places)] = places
        for n in range(len(held)):
            held[n] = self._calls.insert(held[n], rows[n], padded, np.int32(len(places)))

    def leave(self, number: int) -> None:
        """Free a sequence's place, and with the last one all memory."""
        self.numbers[self.numbers == number] = -1
        if self.is_empty:
            self.close()

    def close(self) -> None:
        self.room, self.cache, self.encoded = Room(), [], []
        self._resize(np.zeros(0, np.int64))

    def rows(self, tokens: dict[int, int]) -> np.ndarray:
        """int32 [R, 4] for a step in which these sequences get these tokens, see
        `jax_engine.steps.steps.IDS`."""
        found = np.zeros((self.room.rows, 4), np.int32)
        for number, token in tokens.items():
            place = self.place_of(number)
            found[place] = (token, self.lengths[place], 1, self.prompts[place])
        return found
