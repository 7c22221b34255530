"""The compiled computation of one architecture.

Where all tokens of a step are one tenant's, and it can miss no expert, the step runs in whole
calls: one for the encoder, one for the decoder. Tokens of several tenants go through a layer's
experts together, and which experts a tenant that can miss needs is known only once its router has
run: such steps run layer by layer (`steps.layered`), as do all while an observer looks on.
    Both are made of the same methods of the model.

How often anything is compiled: shapes are rounded up (`steps.buckets`), and a whole call is
compiled once for each triple of rows, prompt length and cache length that occurs, whichever tenants
use it. `traces` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jax_engine.experts.residuals import Residuals
from jax_engine.models.encoder_decoder import KeyValues
from jax_engine.steps.compiled import Compiled
from jax_engine.steps.layered import Layered
from jax_engine.tenants.ready import Architecture, Leaves, ReadyTenant

Array = jax.Array

IDS, PLACE, LIVE, PROMPT = range(4)
"""Columns of what a decoded row is told by: its token, the token's place in the cache, whether it
takes part, and the length of its prompt."""


class Steps:
    """Compiled functions for one architecture."""

    def __init__(self, architecture: Architecture, compiled: Compiled):
        self._architecture, self._compiled = architecture, compiled
        self._encode = compiled("encode", self._encode_body)
        self._decode = compiled("decode", self._decode_body, donate_argnums=0)
        self._answer = compiled("answer", self._answer_body, static_argnums=0)

    @cached_property
    def layered(self) -> Layered:
        """The same computation layer by layer."""
        return Layered(self._architecture, self._compiled)

    def _encode_body(
        self,
        pool: Leaves,
        tenant: Leaves,
        slot_of: Array,
        ids: Array,
        lengths: Array,
        residuals: Residuals,
    ) -> list[KeyValues]:
        model = self._architecture.model(pool, tenant)
        found: list[KeyValues] = model.encode(ids, below(lengths, ids.shape[1]), slot_of, residuals)
        return found

    def _decode_body(
        self,
        cache: list[KeyValues],
        pool: Leaves,
        tenant: Leaves,
        slot_of: Array,
        vocab_size: Array,
        rows: Array,
        encoded: list[KeyValues],
        residuals: Residuals,
    ) -> tuple[Array, Array, list[KeyValues]]:
        model = self._architecture.model(pool, tenant)
        ids, live, encoder_live = (
            rows[:, IDS, None],
            rows[:, LIVE, None] > 0,
            prompt_live(rows[:, PROMPT], encoded),
        )
        x, cache = model.decode(
            ids, live, slot_of, cache, rows[:, PLACE], encoded, encoder_live, residuals
        )
        logits = model.logits(x, vocab_size)[:, 0]
        return jnp.argmax(logits, axis=-1), logits, cache

    def _answer_body(
        self,
        every: bool,
        pool: Leaves,
        tenant: Leaves,
        slot_of: Array,
        vocab_size: Array,
        ids: Array,
        lengths: Array,
        prompts: Array,
        encoded: list[KeyValues],
        residuals: Residuals,
    ) -> tuple[Array, Array, list[KeyValues]]:
        model = self._architecture.model(pool, tenant)
        live, encoder_live = below(lengths, ids.shape[1]), prompt_live(prompts, encoded)
        x, kept = model.decode(
            ids, live, slot_of, None, None, encoded, encoder_live, residuals, together=every
        )
        if every:
            logits = model.logits(x, vocab_size)
            return jnp.argmax(logits, axis=-1), logits, []
        logits = model.logits(last_of(x, lengths), vocab_size)[:, 0]
        return jnp.argmax(logits, axis=-1), logits, kept

    def encode(self, pool: Leaves, tenant: ReadyTenant, ids: Any, lengths: Any) -> list[KeyValues]:
        """Prompts int32 [B, S], lengths int32 [B] -> what the decoder's layers attend to."""
        found: list[KeyValues] = self._encode(
            pool, tenant.leaves, tenant.slot_of, ids, lengths, tenant.residuals
        )
        return found

    def decode(
        self,
        pool: Leaves,
        tenant: ReadyTenant,
        cache: list[KeyValues],
        rows: Any,
        encoded: Sequence[KeyValues],
    ) -> tuple[Array, Array, list[KeyValues]]:
        """One token more in every live row; rows: int32 [B, 4], see `IDS`.

        Returns the winners int32 [B], the logits float32 [B, V] and the cache; the one given is
        used up.
        """
        found: tuple[Array, Array, list[KeyValues]] = self._decode(
            cache,
            pool,
            tenant.leaves,
            tenant.slot_of,
            tenant.vocab_size,
            rows,
            encoded,
            tenant.residuals,
        )
        return found

    def answer(
        self,
        pool: Leaves,
        tenant: ReadyTenant,
        ids: Any,
        lengths: Any,
        prompts: Any,
        encoded: Sequence[KeyValues],
        every: bool,
    ) -> tuple[Array, Array, list[KeyValues]]:
        """Whole answers from their start on: ids int32 [B, T], lengths and prompts (lengths, too)
        int32 [B].

        every: winners int32 [B, T] and logits float32 [B, T, V] at every position, as if all were
        read at once, and nothing to keep. Else of each row's last token, [B] and [B, V], and the
        keys and values [B, N, T, D] of each layer, as if tokens had come one by one.
        """
        found: tuple[Array, Array, list[KeyValues]] = self._answer(
            every,
            pool,
            tenant.leaves,
            tenant.slot_of,
            tenant.vocab_size,
            ids,
            lengths,
            prompts,
            encoded,
            tenant.residuals,
        )
        return found


def below(lengths: Array, size: int) -> Array:
    """bool [B, size]: the tokens of rows of these lengths int32 [B]."""
    return jnp.arange(size) < lengths[:, None]


def prompt_live(lengths: Array, encoded: Sequence[KeyValues]) -> Array:
    """bool [B, S]: the prompts' tokens."""
    return below(lengths, encoded[0][0].shape[2])


def last_of(x: Array, lengths: Array) -> Array:
    """[B, T, H] -> [B, 1, H] at each row's last token."""
    return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
