"""The tokens of a step, tenant by tenant.

Tokens are flat: no padding enters a matrix product. Legend: tokens T, hidden H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from torch_engine.layers.cache import Blocks
from torch_engine.layers.norm import rms_norms
from torch_engine.products import Weight, linears
from torch_engine.tenants.weights import TenantWeights


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that are read in a step: start..stop of the segment's, at positions
    first...

    places: int64 [first + stop - start], where the sequence's keys lie in the cache; None if they
    are not kept and first is 0.
    """

    start: int
    stop: int
    first: int
    places: Tensor | None


@dataclass(frozen=True)
class Singles:
    """The rows that append one token each: the first tokens of a segment, a row each.

    blocks: where their keys lie. lengths: int64 [rows] on the host, tokens after this step.
    """

    blocks: list[Blocks]
    lengths: np.ndarray


@dataclass(frozen=True)
class Segment:
    """The tokens of one tenant in a step: first single ones, then chunks of prompts.

    start, stop: its place among the step's tokens. token_ids, positions: int64 [T of this segment].
    places: int64 [T], where keys and values go in the cache; None if they are not kept. last: the
        largest position.
    """

    tenant_index: int
    weights: TenantWeights
    start: int
    stop: int
    token_ids: Tensor
    positions: Tensor
    places: Tensor | None
    last: int
    singles: Singles | None
    chunks: list[Chunk]


class Segments:
    """Adjacent segments, and products of their tokens with what each tenant has of its own.

    starts: int64 [segments + 1], where each one's tokens begin, counted from the first's.
    """

    def __init__(self, segments: Sequence[Segment]):
        self.all = segments
        self.start, self.stop = segments[0].start, segments[-1].stop
        self.starts = np.array(
            [s.start - self.start for s in segments] + [self.stop - self.start], dtype=np.int64
        )
        self._kernels = segments[0].weights.kernels
        self._eps = [s.weights.shape.norm_eps for s in segments]

    def slices(self) -> Iterator[tuple[Segment, slice]]:
        """Each segment with the place of its tokens."""
        for segment, start, stop in zip(self.all, self.starts[:-1], self.starts[1:], strict=True):
            yield segment, slice(int(start), int(stop))

    def linear(self, x: Tensor, weights: Sequence[Weight]) -> Tensor:
        """[T, in] -> [T, out], each segment with its tenant's matrix, all of one shape."""
        return linears(x, self.starts, weights)

    def plus(self, x: Tensor, biases: Sequence[Tensor]) -> None:
        """x [T, out] += each tenant's bias."""
        for (_, at), bias in zip(self.slices(), biases, strict=True):
            x[at] += bias

    def norm(self, x: Tensor, weights: Sequence[Tensor], rows: int = 1) -> Tensor:
        """`rms_norm` with each tenant's weight. x: [T * rows, H], `rows` for each token."""
        return rms_norms(self._kernels, x, self.starts * rows, weights, self._eps)


def scaled(x: Tensor, segments: Segments, numbers: Sequence[float]) -> Tensor:
    """x [T, H] times each tenant's number, in the type of x."""
    if len(set(numbers)) == 1:
        return x if numbers[0] == 1.0 else x * numbers[0]
    return joined([x[at] * n for (_, at), n in zip(segments.slices(), numbers, strict=True)])


T = TypeVar("T")


def present(weights: Sequence[T | None]) -> list[T]:
    """Weights that a shape says are there."""
    found = [w for w in weights if w is not None]
    assert len(found) == len(weights)
    return found


def joined(parts: list[Tensor]) -> Tensor:
    """Parts of tokens as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
