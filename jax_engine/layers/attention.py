"""Multi-head attention over given keys and values, and masks.

Legend: rows B, query tokens T, key tokens L, hidden H, heads N, head size D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.families.shape import Attention
from jax_engine.experts.products import Products
from jax_engine.layers.linear import Linear
from jax_engine.layers.variables import Initializer

KeyValues = tuple[Array, Array]
"""Keys and values of a layer, each [B, N, length, D]."""

MASKED = -1e30  # finite, so that a row without any token gives no NaN


class MultiHeadAttention(nnx.Module):
    """Self-attention, or cross-attention to the encoder's output."""

    def __init__(
        self,
        products: Products,
        shape: Attention,
        hidden: int,
        layer: int,
        cross: bool,
        initial: Initializer,
    ):
        """layer: number among all layers."""
        self.heads, self.head_dim, self.scale = shape.heads, shape.head_dim, shape.scale
        inner = self.heads * self.head_dim
        std = hidden**-0.5

        def linear(roles: str, std: float) -> Linear:
            sources = [(f"cross_{role}" if cross else role, layer) for role in roles]
            dims = (hidden, inner) if roles == "o" else (inner, hidden)
            return Linear(products, sources, dims, std, initial)

        if cross:
            self.q = linear("q", std * self.head_dim**-0.5)
            self.kv = linear("kv", std)
        else:
            self.qkv = linear("qkv", std)
        self.o = linear("o", inner**-0.5)

    def split(self, x: Array, count: int) -> list[Array]:
        """[B, T, count * N * D] -> count of [B, N, T, D]."""
        whole = x.reshape(*x.shape[:2], count, self.heads, self.head_dim)
        return [whole[:, :, i].transpose(0, 2, 1, 3) for i in range(count)]

    def key_values(self, encoded: Array) -> KeyValues:
        """What a decoder layer attends to of the encoder's output [B, S, H]."""
        k, v = self.split(self.kv(encoded), 2)
        return k, v

    def attend(self, q: Array, keys: Array, values: Array, bias: Array) -> Array:
        """Attention of queries to keys.

        Args:
            q: [B, N, T, D].
            keys, values: [B, N, L, D].
            bias: float32, broadcast to [B, N, T, L], mask included.
        Returns:
            [B, T, H].
        """
        scores = jnp.einsum("bntd,bnld->bntl", q, keys, preferred_element_type=jnp.float32)
        scores = (scores if self.scale == 1.0 else scores * self.scale) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        mixed = jnp.einsum("bntl,bnld->bntd", weights, values)
        return self.o(mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1))


def append(cache: Array, new: Array, offsets: Any) -> Array:
    """A cache [B, N, L, D] with new [B, N, 1, D] at each row's offset, int32 [B].

    An offset outside 0..L-1 is nowhere. Row by row, so that rows that lie on several devices stay
    where they are.
    """
    put: Callable[..., Array] = jax.vmap(
        lambda row, token, offset: row.at[:, offset].set(token, mode="drop")
    )
    return put(cache, new[:, :, 0].astype(cache.dtype), offsets)


def prompt_mask(live: Array) -> Array:
    """Mask of the cross-attention, float32 [B, 1, 1, S]. live: bool [B, S]."""
    return jnp.where(live[:, None, None], 0.0, MASKED).astype(jnp.float32)
