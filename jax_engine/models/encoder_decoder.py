"""An encoder-decoder with sparse layers, such as Switch Transformer.

Source: Switch Transformers (arXiv 2101.03961) and T5 (arXiv 1910.10683); order of operations as in
transformers, models/switch_transformers/modeling_switch_transformers.py.
Legend: rows B, tokens of a row T (decoder) or S (encoder), cache length L, hidden H, heads N, head
size D, experts E, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.families.shape import (
    DECODER_EMBED,
    EMBED,
    ENCODER_EMBED,
    ENCODER_NORM,
    HEAD,
    NORM,
    RelativePositions,
)
from jax_engine.experts.residuals import Residuals
from jax_engine.layers.attention import MASKED, KeyValues, prompt_mask
from jax_engine.layers.linear import Linear
from jax_engine.layers.norm import Norm
from jax_engine.layers.relative_positions import RelativePositionBias
from jax_engine.layers.variables import Initializer
from jax_engine.models.block import Block
from jax_engine.models.spec import ModelSpec

TABLES = (ENCODER_EMBED, DECODER_EMBED, HEAD)
"""Uses of a table [V, H], each with one of its own or with the shared one."""


class EncoderDecoderModel(nnx.Module):
    """Encoder, decoder, embeddings and head."""

    def __init__(self, spec: ModelSpec, initial: Initializer):
        shape, hidden = spec.shape, spec.shape.hidden
        self.spec = spec

        def table(role: str) -> Linear:
            std = hidden**-0.5 if role == HEAD else 1.0
            dims = (spec.vocab_size, hidden)
            return Linear(spec.products, [(role, None)], dims, std, initial)

        own = [role for role in TABLES if role in shape.own_tables]
        if len(own) < len(TABLES):
            self.embed_table = table(EMBED)
        for role in own:
            setattr(self, f"{role}_table", table(role))
        first = spec.first_of_decoder
        self.encoder_bias = self._bias(0, initial)
        self.decoder_bias = self._bias(first, initial)
        count = len(shape.layers)
        self.encoder = nnx.List([Block(spec, n, initial) for n in range(first)])
        self.decoder = nnx.List([Block(spec, n, initial) for n in range(first, count)])
        self.encoder_norm = Norm((ENCODER_NORM, None), hidden, shape.norm_eps)
        self.decoder_norm = Norm((NORM, None), hidden, shape.norm_eps)

    def _bias(self, layer: int, initial: Initializer) -> RelativePositionBias:
        shape = self.spec.shape
        positions, std = shape.attention.positions, shape.hidden**-0.5
        assert isinstance(positions, RelativePositions), "check_shape refuses others"
        return RelativePositionBias(
            positions, shape.attention.heads, layer, layer == 0, std, initial
        )

    # What a step is made of: `CompiledSteps` runs it in one compiled call, `LayeredSteps` one by
    # one where a token may need an expert that is not resident.

    def embed(self, role: str, ids: Array) -> Array:
        """int32 [B, T] -> [B, T, H]. role: `ENCODER_EMBED` or `DECODER_EMBED`."""
        return self._table(role).rows(ids)

    def _table(self, role: str) -> Linear:
        own = role in self.spec.shape.own_tables
        table: Linear = getattr(self, f"{role if own else EMBED}_table")
        return table

    def bias_of_encoder(self, live: Array) -> Array:
        """Position bias and mask, float32 [B, N, S, S]. live: bool [B, S]."""
        size = live.shape[1]
        return jnp.where(
            live[:, None, None], self.encoder_bias(jnp.arange(size)[None], size, size), MASKED
        )

    def bias_of_decoder(self, queries: Array, keys: int) -> Array:
        """Position bias and causal mask of tokens at `queries` int32 [B, T] over keys at 0..:
        float32 [B, N, T, L]."""
        bias = self.decoder_bias(queries, keys, keys)
        return jnp.where(jnp.arange(keys) <= queries[:, None, :, None], bias, MASKED)

    def encoded(self, x: Array) -> list[KeyValues]:
        """The encoder's last hidden states -> what each decoder layer attends to."""
        normed = self.encoder_norm(x)
        return [block.cross_attention.key_values(normed) for block in self.decoder]

    def logits(self, x: Array, vocab_size: Array | int) -> Array:
        """Hidden states [B, T, H] -> float32 [B, T, V]; ids from vocab_size on are padding and get
        MASKED."""
        x, scale = self.decoder_norm(x), self.spec.shape.scalars.head_input
        if scale != 1.0:
            x = x * scale
        found = self._table(HEAD)(x).astype(jnp.float32)
        return jnp.where(jnp.arange(found.shape[-1]) < vocab_size, found, MASKED)

    # All layers in one go.

    def encode(
        self, ids: Array, live: Array, slot_of: Array, residuals: Residuals = ()
    ) -> list[KeyValues]:
        """Prompts int32 [B, S] -> each decoder layer's keys and values."""
        x, bias = self.embed(ENCODER_EMBED, ids), self.bias_of_encoder(live)
        for block in self.encoder:
            x = block.feed(block.encode(x, bias), slot_of, live, residuals, together=True)
        return self.encoded(x)

    def decode(
        self,
        ids: Array,
        live: Array,
        slot_of: Array,
        cache: Sequence[KeyValues] | None,
        offsets: Array | None,
        encoded: Sequence[KeyValues],
        encoder_live: Array,
        residuals: Residuals = (),
        together: bool = False,
    ) -> tuple[Array, list[KeyValues]]:
        """Tokens through all decoder layers.

        Args:
            cache: one token a row, ids int32 [B, 1], is appended to its row's cache at `offsets`
                int32 [B]; rows that are not live keep theirs. None: ids int32 [B, T] are whole
                answers from their start on.
            together: see `Top1Router`.
        Returns:
            Hidden states [B, T, H], and the keys and values to keep.
        """
        x, offsets, bias, encoder_bias = self.begin_decoder(
            ids, live, offsets, None if cache is None else cache[0][0].shape[2], encoder_live
        )
        kept = []
        for n, (block, theirs) in enumerate(zip(self.decoder, encoded, strict=True)):
            x, mine = block.decode(
                x, bias, cache[n] if cache else None, offsets, theirs, encoder_bias
            )
            kept.append(mine)
            x = block.feed(x, slot_of, live, residuals, together)
        return x, kept

    def begin_decoder(
        self, ids: Array, live: Array, offsets: Array | None, cache: int | None, encoder_live: Array
    ) -> tuple[Array, Array | None, Array, Array]:
        """What the decoder's layers work with.

        Args:
            cache: its length, None without one.
        Returns:
            x [B, T, H], offsets (outside the cache for rows that are not live), and the biases of
            self-attention and cross-attention.
        """
        if cache is None or offsets is None:
            queries, keys = jnp.arange(ids.shape[1])[None], ids.shape[1]
        else:
            queries, keys = offsets[:, None], cache
            offsets = jnp.where(live[:, 0], offsets, keys)
        return (
            self.embed(DECODER_EMBED, ids),
            offsets,
            self.bias_of_decoder(queries, keys),
            prompt_mask(encoder_live),
        )
