"""The feed-forward of a layer that is not sparse."""

from __future__ import annotations

from flax import nnx
from jax import Array

from common.families.shape import DENSE, Experts, feed_forward
from jax_engine.experts.dispatch import Dispatch, FeedForward
from jax_engine.experts.products import Products
from jax_engine.layers.linear import Linear
from jax_engine.layers.variables import Initializer


class DenseFeedForward(nnx.Module):
    """A feed-forward of the tenant's own, for all tokens; of the experts' activation and gating."""

    def __init__(
        self,
        products: Products,
        dispatch: Dispatch,
        experts: Experts,
        hidden: int,
        inner: int,
        layer: int,
        initial: Initializer,
    ):
        """layer: number among all layers."""
        self.ff, self.dispatch = FeedForward(experts.activation, experts.gated, inner), dispatch
        self.matrices = nnx.List(
            [
                Linear(products, [(DENSE[role], layer)], dims, dims[1] ** -0.5, initial)
                for role, dims in feed_forward(experts.gated, hidden, inner)
            ]
        )

    def __call__(self, x: Array) -> Array:
        """[B, T, H] -> [B, T, H]."""
        copy = tuple(m.weight[...] for m in self.matrices)
        return self.dispatch.single(x.reshape(-1, x.shape[-1]), copy, self.ff).reshape(x.shape)
