"""T5's relative positions: a bias of the attention for each head and bucket of distances.

Source: Exploring the Limits of Transfer Learning (arXiv 1910.10683), section 2.1; the rounding is
that of transformers, models/switch_transformers/modeling_switch_transformers.py
(`_relative_position_bucket`).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from common.families.shape import RelativePositions
from jax_engine.layers.variables import Initializer, tenant_variable


def relative_buckets(
    offsets: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """The bucket of each offset (key position - query position): int32, of the offsets' shape.

    Small distances have a bucket each, larger ones share buckets that grow logarithmically up to
    max_distance. In a decoder (bidirectional=False) offsets above 0 count as 0; they are masked
    anyway.
    """
    found: np.ndarray = np.zeros(offsets.shape, dtype=np.int32)
    if bidirectional:
        num_buckets //= 2
        found += (offsets > 0) * num_buckets
        distance = np.abs(offsets)
    else:
        distance = -np.minimum(offsets, 0)
    exact = num_buckets // 2
    # float32 throughout, as in torch: at powers of the base the last bit decides the bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    large = exact + (ratio * np.float32(num_buckets - exact)).astype(np.int32)
    found += np.where(distance < exact, distance, np.minimum(large, num_buckets - 1)).astype(
        np.int32
    )
    return found


class RelativePositionBias(nnx.Module):
    """A table [buckets, N] that the layers of a side share."""

    def __init__(
        self,
        positions: RelativePositions,
        heads: int,
        layer: int,
        bidirectional: bool,
        std: float,
        initial: Initializer,
    ):
        """layer: the first of the side, which the table belongs to. bidirectional: an encoder's."""
        self.positions, self.bidirectional = positions, bidirectional
        value = initial.normal((positions.buckets, heads), "float32", std)
        self.table = tenant_variable(value, (("position_bias", layer),), packed=False)

    def __call__(self, queries: Array, num_keys: int, num_queries: int) -> Array:
        """The bias of each query for the keys at 0..num_keys-1.

        Args:
            queries: int32 [B, T], positions.
            num_queries: how many positions queries can come from, from 0 on; bounds the table of
                offsets.
        Returns:
            float32 [B, N, T, keys].
        """
        offsets = np.arange(-(num_queries - 1), num_keys)
        buckets = relative_buckets(
            offsets, self.bidirectional, self.positions.buckets, self.positions.max_distance
        )
        by_offset = self.table[...][buckets]
        index = jnp.arange(num_keys) - queries[..., None] + (num_queries - 1)
        return by_offset[index].transpose(0, 3, 1, 2)
