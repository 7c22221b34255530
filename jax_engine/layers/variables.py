"""Variables of the model: two types, what they say of themselves, and where first values come from.

`nnx.Param` is what a tenant has of its own, `PoolVariable` a copy in the pool. Both say in their
metadata which tensors they are made of. That one description serves shapes, loading, initialisation
and saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

TensorRole = tuple[str, int | None]
"""What a tensor is: its role, and its layer among all layers (None: of the whole model). A family
names it (`Family.tensor_name`)."""


class PoolVariable(nnx.Variable[Array]):
    """Weights in the expert pool, shared by all tenants.

    Metadata: layer (its number among the sparse ones), slot (None: all slots stacked), projection.
    """


def tenant_variable(value: Any, roles: Sequence[TensorRole], packed: bool) -> nnx.Param[Array]:
    """A tenant's own variable.

    Args:
        roles: its tensors, stacked along their first axis.
        packed: whether it is a matrix that `Products` packs.
    """
    return nnx.Param(value, roles=tuple(roles), packed=packed)


class Initializer:
    """Where initial values come from: a seed, or none for shapes alone.

    Not `nnx.Rngs`: its counter is a variable, and tracing thousands of its updates takes minutes.
    """

    def __init__(self, seed: int | None):
        self._key = None if seed is None else jax.random.key(seed)
        self._drawn = 0

    def normal(self, shape: tuple[int, ...], dtype: str, std: float) -> Array:
        """Normal noise; zeros without a seed."""
        if self._key is None:
            return jnp.zeros(shape, dtype)
        key = jax.random.fold_in(self._key, self._drawn)
        self._drawn += 1
        return jax.random.normal(key, shape, dtype) * std
