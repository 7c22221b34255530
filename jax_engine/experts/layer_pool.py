"""The copies of one sparse layer, as variables of the model."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.families.shape import Dims
from jax_engine.experts.dispatch import Dispatch, FeedForward, Matrices
from jax_engine.experts.products import Products
from jax_engine.experts.residuals import LayerResiduals
from jax_engine.layers.variables import Initializer, PoolVariable


class LayerPool(nnx.Module):
    """The slots of one sparse layer."""

    def __init__(
        self,
        products: Products,
        dispatch: Dispatch,
        ff: FeedForward,
        projections: tuple[tuple[str, Dims], ...],
        position: int,
        slots: int,
        initial: Initializer,
    ):
        """projections: (role, [out, in]) of a copy. position: number among the sparse layers."""
        self.ff, self.dispatch = ff, dispatch
        lead = (slots,) if dispatch.stacked else ()

        def copy(slot: int | None) -> nnx.List[PoolVariable]:
            made = []
            for role, dims in projections:
                value = initial.normal((*lead, *dims), products.weights, dims[1] ** -0.5)
                value = value if dispatch.stacked else products.pack(value)
                made.append(PoolVariable(value, layer=position, slot=slot, projection=role))
            return nnx.List(made)

        self.copies = nnx.List(
            [copy(None)] if dispatch.stacked else [copy(slot) for slot in range(slots)]
        )

    def __call__(self, x: Array, slots: Array, residuals: LayerResiduals | None) -> Array:
        """Tokens through their slots; zeros where a slot is not of this pool.

        Args:
            x: [B, T, H].
            slots: int32 [B, T].
        """
        copies: list[Matrices] = [tuple(w[...] for w in copy) for copy in self.copies]
        if not copies:
            return jnp.zeros_like(x)
        flat = x.reshape(-1, x.shape[-1])
        return self.dispatch(flat, slots.reshape(-1), copies, self.ff, residuals).reshape(x.shape)
