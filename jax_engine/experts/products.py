"""How weights are laid out and multiplied: as they are by XLA, or packed for our own CPU
kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from common.dtypes import BY_NAME, to_float32
from common.kernels.packed_weights import BLOCK

if TYPE_CHECKING:
    from jax_engine.native import Kernels

Array = jax.Array


@dataclass(frozen=True)
class Products(ABC):
    """weights: type that matrices are kept in; compute: type of activations."""

    weights: str
    compute: str

    @property
    @abstractmethod
    def name(self) -> str:
        """Who multiplies, as `Engine.stats` says it."""

    def prepare(self, weight: np.ndarray) -> np.ndarray:
        """A matrix in the type that it is kept in."""
        return to_numpy(weight, self.weights)

    @abstractmethod
    def pack(self, weight: Any) -> Any:
        """[out, in] -> what `linear` multiplies with. Takes numpy arrays and, abstractly, jax's."""

    @abstractmethod
    def linear(self, x: Array, weight: Array, out_features: int) -> Array:
        """`x @ weight.T`: compute [..., in] -> compute [..., out]."""

    @abstractmethod
    def rows(self, table: Array, ids: Array, width: int) -> Array:
        """Rows of a packed [vocab, width] table: int32 [...] -> compute [..., width]."""


@dataclass(frozen=True)
class PlainProducts(Products):
    """[out, in] as it is on disk: on a CPU, XLA reads it up to 1.7 times as fast as [in, out]
    (docs/results).

    rounded: values are rounded to bfloat16 though kept in float32, for a CPU, where XLA is slow on
        bfloat16.
    """

    rounded: bool = False

    @property
    def name(self) -> str:
        return "XLA"

    def prepare(self, weight: np.ndarray) -> np.ndarray:
        return to_numpy(to_numpy(weight, "bfloat16") if self.rounded else weight, self.weights)

    def pack(self, weight: Any) -> Any:
        return weight

    def linear(self, x: Array, weight: Array, out_features: int) -> Array:
        return jnp.einsum("...k,nk->...n", x, weight.astype(x.dtype))

    def rows(self, table: Array, ids: Array, width: int) -> Array:
        return jnp.take(table, ids, axis=0, mode="clip").astype(self.compute)


@dataclass(frozen=True)
class NativeProducts(Products):
    """Packed in blocks of 64 outputs, for the kernels of `jax_engine.native`."""

    kernels: Kernels

    @property
    def name(self) -> str:
        return f"own kernels ({self.kernels.target})"

    def pack(self, weight: Any) -> Any:
        return self.kernels.pack(weight)

    def linear(self, x: Array, weight: Array, out_features: int) -> Array:
        return self.kernels.linear(x, weight, out_features)

    def rows(self, table: Array, ids: Array, width: int) -> Array:
        *_, steps, size = table.shape
        cells = table.reshape(-1, steps, BLOCK, size // BLOCK)
        found = cells[ids // BLOCK, :, ids % BLOCK].astype(self.compute)
        return found.reshape(*ids.shape, -1)[..., :width]


def make_products(kind: str, weights: str, compute: str) -> Products:
    """kind: native or plain."""
    if kind == "plain":
        return PlainProducts(weights, compute)
    from jax_engine import native

    kernels = native.load()
    assert kernels is not None
    return NativeProducts(weights, compute, kernels)


def to_numpy(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a type named as jax names it; bfloat16 widens without a table."""
    return to_float32(array) if dtype == "float32" else array.astype(BY_NAME[dtype], copy=False)
