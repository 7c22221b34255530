"""Checkpoints compared tensor by tensor, and sparse layers moved to others."""

from __future__ import annotations

import numpy as np

from common.checkpoints import (
    Checkpoint,
)


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """Every canonical tensor bit for bit."""
    assert set(found.tensors) == set(expected.tensors)
    for name, array in expected.stream():
        mine = found.tensors[name].read()
        assert (
            mine.flags.c_contiguous and mine.dtype == array.dtype and mine.shape == array.shape
        ), name
        assert mine.shape == found.tensors[name].shape and mine.nbytes == found.tensors[name].nbytes
        assert mine.tobytes() == array.tobytes(), name


# Configs


def moved_experts(parameters: dict[str, np.ndarray], layers: int = 6) -> dict[str, np.ndarray]:
    """A tree of 6 encoder layers with experts in 2 and 5, as flaxformer places them; transformers
    would say 1 and 4."""
    found = {n: a for n, a in parameters.items() if not n.startswith("encoder.layers_")}
    for i in range(layers):
        source = "encoder.layers_1." if i % 3 == 2 else "encoder.layers_0."
        found |= {
            n.replace(source, f"encoder.layers_{i}."): a
            for n, a in parameters.items()
            if n.startswith(source)
        }
    return found


WI = "encoder.layers_1.mlp.expert.wi.kernel"
