"""T5's relative position buckets.

Source: Exploring the Limits of Transfer Learning (arXiv 1910.10683), section 2.1; the rounding is
that of transformers, models/switch_transformers/modeling_switch_transformers.py
(`_relative_position_bucket`).
"""

from __future__ import annotations

import math

import numpy as np


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
