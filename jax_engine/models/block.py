"""One layer of the model.

Legend: rows B, tokens of a row T (decoder) or S (encoder), hidden H, experts E.
"""

from __future__ import annotations

from flax import nnx
from jax import Array

from common.families.shape import Sparse
from jax_engine.experts.layer_pool import LayerPool
from jax_engine.experts.residuals import Residuals
from jax_engine.experts.router import Top1Router
from jax_engine.layers.attention import KeyValues, MultiHeadAttention, append
from jax_engine.layers.feed_forward import DenseFeedForward
from jax_engine.layers.norm import Norm
from jax_engine.layers.variables import Initializer
from jax_engine.models.spec import ModelSpec


class Block(nnx.Module):
    """Self-attention, in the decoder cross-attention, then a feed-forward: a pool of experts or a
    dense one."""

    def __init__(self, spec: ModelSpec, layer: int, initial: Initializer):
        """layer: number among all layers."""
        shape, products = spec.shape, spec.products
        hidden, epsilon, mlp = shape.hidden, shape.norm_eps, shape.layers[layer]
        self.position = mlp.position if isinstance(mlp, Sparse) else None

        def attention(cross: bool) -> MultiHeadAttention:
            return MultiHeadAttention(products, shape.attention, hidden, layer, cross, initial)

        self.attention_norm = Norm(("input_norm", layer), hidden, epsilon)
        self.attention = attention(cross=False)
        if layer >= spec.first_of_decoder:
            self.cross_norm = Norm(("cross_norm", layer), hidden, epsilon)
            self.cross_attention = attention(cross=True)
        self.ff_norm = Norm(("post_norm", layer), hidden, epsilon)
        if isinstance(mlp, Sparse):
            self.router = Top1Router(shape.experts, hidden, layer, spec.capacity, initial)
            self.pool = LayerPool(
                products,
                spec.dispatch,
                spec.feed_forward,
                shape.experts.projections(hidden),
                mlp.position,
                spec.slots[mlp.position],
                initial,
            )
        else:
            self.dense = DenseFeedForward(
                products, spec.dispatch, shape.experts, hidden, mlp.inner, layer, initial
            )

    def encode(self, x: Array, bias: Array) -> Array:
        """Self-attention over whole rows [B, S, H]."""
        q, k, v = self.attention.split(self.attention.qkv(self.attention_norm(x)), 3)
        return x + self.attention.attend(q, k, v, bias)

    def decode(
        self,
        x: Array,
        bias: Array,
        cache: KeyValues | None,
        offsets: Array | None,
        encoded: KeyValues,
        encoder_bias: Array,
    ) -> tuple[Array, KeyValues]:
        """Self-attention, then cross-attention.

        Args:
            cache: x of one token a row is put in at `offsets` int32 [B] (outside the cache:
                nowhere). None: x is all that there is, and its own keys and values are returned.
        Returns:
            What goes on, and the keys and values to keep.
        """
        q, k, v = self.attention.split(self.attention.qkv(self.attention_norm(x)), 3)
        if cache is None:
            keys, values = k, v
        else:
            keys, values = append(cache[0], k, offsets), append(cache[1], v, offsets)
        x = x + self.attention.attend(q, keys, values, bias)
        (q,) = self.cross_attention.split(self.cross_attention.q(self.cross_norm(x)), 1)
        x = x + self.cross_attention.attend(q, *encoded, encoder_bias)
        return x, (keys, values)

    def route(
        self, x: Array, slot_of: Array, live: Array, together: bool
    ) -> tuple[Array, Array, Array]:
        """Normed tokens [B, T, H], their slots and gates [B, T].

        Args:
            slot_of: int32 [E], the tenant's in this layer.
            together: see `Top1Router`.
        """
        normed = self.ff_norm(x)
        return normed, *self.router(normed, slot_of, live, together)

    def feed_dense(self, x: Array) -> Array:
        """The feed-forward of a layer without experts, added to its input."""
        return x + self.dense(self.ff_norm(x))

    def feed(
        self, x: Array, slot_of: Array, live: Array, residuals: Residuals, together: bool = True
    ) -> Array:
        """The feed-forward, added to its input.

        Args:
            slot_of: int32 [sparse layers, E], the tenant's row of the plan.
            residuals: what the tenant adds to the copies.
        """
        if self.position is None:
            return self.feed_dense(x)
        normed, slots, gates = self.route(x, slot_of[self.position], live, together)
        mine = residuals[self.position] if residuals else None
        return combine(x, self.pool(normed, slots, mine), gates)


def combine(x: Array, found: Array, gates: Array) -> Array:
    """The residual stream plus the experts' outputs, each scaled by its router's probability."""
    return x + found * gates[..., None]
