"""The compiled computation of one architecture, in whole calls.

Where all tokens of a step are one tenant's, and it can miss no expert, the step runs in whole
calls: one for the encoder, one for the decoder. Other steps run layer by layer (`steps.layered`).
Both are made of the same methods of the model.

Shapes are rounded up (`steps.buckets`). So a whole call is compiled once for each triple of rows,
prompt length and cache length that occurs, whichever tenants use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_engine.experts.residuals import Residuals
from jax_engine.layers.attention import KeyValues
from jax_engine.models.architecture import Architecture, Leaves
from jax_engine.steps.compilation import CountedJit
from jax_engine.steps.kv_cache import IDS, LIVE, OFFSET, PROMPT
from jax_engine.steps.layered import LayeredSteps
from jax_engine.tenants.ready import ReadyTenant


class CompiledSteps:
    """Compiled functions for one architecture."""

    def __init__(self, architecture: Architecture, jit: CountedJit):
        self._architecture, self._jit = architecture, jit
        self._encode = jit("encode", self._encode_body)
        self._decode = jit("decode", self._decode_body, donate_argnums=0)
        self._answer = jit("answer", self._answer_body, static_argnums=0)

    @cached_property
    def layered(self) -> LayeredSteps:
        """The same computation layer by layer."""
        return LayeredSteps(self._architecture, self._jit)

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
        return model.encode(ids, tokens_below(lengths, ids.shape[1]), slot_of, residuals)

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
            prompt_tokens(rows[:, PROMPT], encoded),
        )
        x, cache = model.decode(
            ids, live, slot_of, cache, rows[:, OFFSET], encoded, encoder_live, residuals
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
        live, encoder_live = tokens_below(lengths, ids.shape[1]), prompt_tokens(prompts, encoded)
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
        """One token more in every live row.

        Args:
            cache: is used up.
            rows: int32 [B, 4], see `steps.kv_cache.IDS`.
        Returns:
            The winners int32 [B], the logits float32 [B, V] and the cache.
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
        """Whole answers from their start on.

        Args:
            ids: int32 [B, T].
            lengths, prompts: int32 [B], tokens of the answers and of the prompts.
            every: winners and logits at every position, as if all were read at once, and nothing to
                keep. Else of each row's last token, as if tokens had come one by one.
        Returns:
            Winners int32 [B] or [B, T], logits float32 [..., V], and keys and values [B, N, T, D]
            of each layer to keep.
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


def tokens_below(lengths: Array, size: int) -> Array:
    """bool [B, size]: the tokens of rows of these lengths int32 [B]."""
    return jnp.arange(size) < lengths[:, None]


def prompt_tokens(lengths: Array, encoded: Sequence[KeyValues]) -> Array:
    """bool [B, S]: the prompts' tokens."""
    return tokens_below(lengths, encoded[0][0].shape[2])


def last_of(x: Array, lengths: Array) -> Array:
    """[B, T, H] -> [B, 1, H] at each row's last token."""
    return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
