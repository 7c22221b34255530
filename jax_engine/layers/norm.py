"""Root-mean-square norm."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jax_engine.layers.variables import Source, tenant_variable


class Norm(nnx.Module):
    """Root-mean-square norm without bias or mean, in float32."""

    def __init__(self, source: Source, hidden: int, epsilon: float):
        self.epsilon = epsilon
        self.weight = tenant_variable(jnp.ones(hidden, jnp.float32), (source,), packed=False)

    def __call__(self, x: Array) -> Array:
        """[..., H] -> [..., H] in the type of x."""
        wide = x.astype(jnp.float32)
        scaled = wide * lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (scaled * self.weight[...]).astype(x.dtype)
