"""Buckets of relative positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersAttention,
)

from jax_engine.layers.relative_positions import relative_buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "distance"),
    [(8, 16), (32, 128), (32, 64), (12, 20), (64, 1000), (4, 3), (16, 100), (128, 2048)],
)
def test_position_buckets_are_hugging_faces(
    buckets: int, distance: int, bidirectional: bool
) -> None:
    offsets = np.arange(-5000, 5001)
    theirs = SwitchTransformersAttention._relative_position_bucket(
        torch.from_numpy(offsets), bidirectional, buckets, distance
    )
    assert np.array_equal(
        relative_buckets(offsets, bidirectional, buckets, distance), theirs.numpy()
    )
