"""The router of a sparse layer: which expert a token goes to, and with which gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.families.shape import Experts
from jax_engine.layers.variables import Initializer, tenant_variable


class Top1Router(nnx.Module):
    """Picks the expert of each token, and the slot of its copy for the tenant at hand.

    Legend: rows B, tokens of a row T, hidden H, experts E.
    """

    def __init__(
        self,
        experts: Experts,
        hidden: int,
        layer: int,
        capacity: int | None,
        initial: Initializer,
    ):
        """layer: number among all layers. capacity: tokens an expert takes of each row; None: all.

        The shape's own capacity is not looked at: whether it holds is an option of the engine.
        """
        self.dtype, self.capacity = experts.router.dtype, capacity
        weight = initial.normal((experts.count, hidden), "float32", 0.02)
        self.weight = tenant_variable(weight, (("router", layer),), packed=False)
        self.biased = experts.router.bias
        if self.biased:
            zeros = jnp.zeros(experts.count, jnp.float32)
            self.bias = tenant_variable(zeros, (("router_bias", layer),), packed=False)

    def logits(self, x: Array) -> Array:
        """[B, T, H] -> [B, T, E] in the router's type."""
        dtype = x.dtype if self.dtype == "hidden" else self.dtype
        found = jnp.einsum("bth,eh->bte", x.astype(dtype), self.weight[...].astype(dtype))
        return found + self.bias[...].astype(dtype) if self.biased else found

    def __call__(
        self, x: Array, slot_of: Array, live: Array, together: bool
    ) -> tuple[Array, Array]:
        """Route tokens.

        Args:
            x: [B, T, H], normed.
            slot_of: int32 [E].
            live: bool [B, T], False at padding.
            together: whether a row's tokens share the experts' capacity, as those that are read at
                once do; tokens of an answer came one by one.
        Returns:
            slots int32 [B, T] (-1: no expert, for padding and tokens over capacity), and gates
            [B, T].
        """
        found = self.logits(x)
        # torch's softmax, too, rounds once, at its end.
        probabilities = jax.nn.softmax(found.astype(jnp.float32), axis=-1)
        probabilities = probabilities.astype(found.dtype).astype(x.dtype)
        expert = jnp.argmax(probabilities, axis=-1)
        if self.capacity is not None and together:
            # Each row's tokens fill its experts in order; what comes too late keeps its residual
            # alone.
            chosen = (
                jax.nn.one_hot(expert, probabilities.shape[-1], dtype=jnp.int32) * live[..., None]
            )
            place = (jnp.cumsum(chosen, axis=1) * chosen).sum(axis=-1)
            live = live & (place <= self.capacity)
        return jnp.where(live, slot_of[expert], -1).astype(jnp.int32), probabilities.max(axis=-1)
