"""How far tenants' experts are apart: L2 distance at every position, for every pair of tenants.

Source: arXiv 2505.06481, section on expert similarity: an expert's matrices flattened together,
Euclidean distance; with more than two tenants the score of a position is the sum over all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from common.checkpoints import Checkpoint
from common.dtypes import to_float32

# Elements converted and compared at a time: large enough that numpy's calls cost little, small
# enough for the caches.
BLOCK = 1 << 17


def tenant_pairs(num_tenants: int) -> list[tuple[int, int]]:
    """(a, b) with a < b, in the order used by every pair axis."""
    return list(combinations(range(num_tenants), 2))


def compare(
    arrays: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Squared L2 distances between equally shaped arrays, and which arrays hold only finite
    numbers.

    arrays: [tenants] of any one shape and float type. Differences are taken in float32, summed in
    float32 within a block of 131,072 elements and in float64 across blocks.
    Returns squared float64 [pairs], finite bool [tenants].
    """
    flat = [a.reshape(-1) for a in arrays]
    squared = np.zeros(len(pairs), dtype=np.float64)
    finite = np.ones(len(arrays), dtype=bool)
    # A tensor that is not finite is reported through `finite`; numpy's own warnings about it would
    # only be noise.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat[0].size, BLOCK):
            blocks = [to_float32(a[start : start + BLOCK]) for a in flat]
            for tenant, block in enumerate(blocks):
                if finite[tenant] and not np.isfinite(block).all():
                    finite[tenant] = False
            for i, (a, b) in enumerate(pairs):
                difference = blocks[a] - blocks[b]
                squared[i] += float(np.dot(difference, difference))
    return squared, finite


@dataclass(frozen=True)
class Distances:
    """matrix: float64 [pairs, layers, experts], pairs in the order of `tenant_pairs`."""

    tenants: tuple[str, ...]
    matrix: np.ndarray

    def __post_init__(self) -> None:
        num_pairs = len(tenant_pairs(len(self.tenants)))
        if self.matrix.ndim != 3 or self.matrix.shape[0] != num_pairs:
            raise ValueError(
                f"matrix is {self.matrix.shape}; {len(self.tenants)} tenants have {num_pairs} pairs"
            )
        self.matrix.setflags(write=False)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return tenant_pairs(len(self.tenants))

    def score(self) -> np.ndarray:
        """float64 [layers, experts]: the sum over all pairs, by which Algorithm 1 orders
        positions."""
        return np.asarray(self.matrix.sum(axis=0))

    def layer_summary(self) -> list[dict[str, float]]:
        """Mean, standard deviation, smallest and largest distance of each layer, over its experts
        and all pairs."""
        summary = []
        for layer in range(self.matrix.shape[1]):
            values = self.matrix[:, layer]
            if values.size == 0:
                values = np.zeros(1)
            summary.append(
                {
                    "mean": float(values.mean()),
                    "std": float(values.std()),
                    "min": float(values.min()),
                    "max": float(values.max()),
                }
            )
        return summary


def measure(
    checkpoints: Sequence[tuple[str, Checkpoint]],
    workers: int | None = None,
    on_tensor: Callable[[], None] | None = None,
) -> Distances:
    """Distances between checkpoints, streamed: each expert tensor is read once, for all pairs.

    checkpoints: (tenant, checkpoint), of one expert shape.
    workers: threads; each holds one tensor of every tenant, which bounds the memory. Default: 2.
    on_tensor: called after each (position, projection), layers * experts * projections times.
    """
    spec = checkpoints[0][1].config.experts
    pairs = tenant_pairs(len(checkpoints))
    squared = np.zeros((len(pairs), spec.num_layers, spec.num_experts), dtype=np.float64)
    first = checkpoints[0][1]

    def one(job: tuple[int, int, str, str]) -> tuple[int, int, np.ndarray]:
        layer, expert, _, name = job
        arrays = [checkpoint.tensors[name].read() for _, checkpoint in checkpoints]
        return layer, expert, compare(arrays, pairs)[0]

    with ThreadPoolExecutor(max_workers=workers or 2) as pool:
        for layer, expert, part in pool.map(one, first.family.iter_expert_tensors(first.config)):
            squared[:, layer, expert] += part
            if on_tensor:
                on_tensor()
    return Distances(tuple(name for name, _ in checkpoints), np.sqrt(squared))
