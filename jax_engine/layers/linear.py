"""Matrices that tokens are multiplied with, and the tables of embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx
from jax import Array

from jax_engine.experts.products import Products
from jax_engine.layers.variables import Initializer, TensorRole, tenant_variable


class Linear(nnx.Module):
    """Matrices [out, in], stacked along their outputs, without bias."""

    def __init__(
        self,
        products: Products,
        roles: Sequence[TensorRole],
        dims: tuple[int, ...],
        std: float,
        initial: Initializer,
    ):
        """dims: [out, in] of each matrix. std: of the initial values."""
        outputs, inputs = dims
        self.products = products
        self.out_features, self.in_features = outputs * len(roles), inputs
        value = initial.normal((self.out_features, inputs), products.weights, std)
        self.weight = tenant_variable(products.pack(value), roles, packed=True)

    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., out]."""
        return self.products.linear(x, self.weight[...], self.out_features)

    def rows(self, ids: Array) -> Array:
        """Rows of the matrix, as of a table of embeddings: int32 [...] -> [..., in]."""
        return self.products.rows(self.weight[...], ids, self.in_features)
