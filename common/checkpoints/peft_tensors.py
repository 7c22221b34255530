"""Tensors of a PEFT adapter: whose they are, and a base's tensor with the adapter added.

A low-rank adapter of a matrix W [out, in] has A [r, in] and B [out, r], and stands for
`W + scaling * B A`. Of a stack of experts [E, out, in] it has A [E * r, in], rows expert by expert,
and B [out, r * E], in whose columns the expert counts fastest. Of an embedding [V, H] it has
A [r, V] and B [H, r], and stands for `W + scaling * (B A)^T`.
Source: peft 0.21, tuners/lora/layer.py: `Linear`, `Embedding`, `ParamWrapper`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoints.checkpoint import TensorSource
from common.checkpoints.safetensors_file import TensorRef
from common.dtypes import BY_NAME, to_float32
from common.errors import CheckpointError
from common.families import Dims

A, B, B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class LowRank:
    """`scaling * left right`, added to a matrix or to some of its rows.

    a, b: as in the adapter's file. expert: of `experts` in a stack, None for a matrix of its own.
    rows: which rows of the file's tensor are meant, None for all. embedding: whether a and b are an
        embedding's.
    """

    a: TensorRef
    b: TensorRef
    rank: int
    scaling: float
    experts: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None
    embedding: bool = False

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """left [out, rank], right [rank, in], float32. Raises CheckpointError for NaN."""
        a, b = self.a.map(), self.b.map()
        if self.embedding:
            a, b = b.T, a.T
        if self.expert is not None:
            a = a[self.expert * self.rank : (self.expert + 1) * self.rank]
            b = b[:, self.expert :: self.experts]
        if self.rows is not None:
            b = b[slice(*self.rows)]
        left, right = (to_float32(np.ascontiguousarray(m)) for m in (b, a))
        refs = (self.a, self.b) if self.embedding else (self.b, self.a)
        for ref, values in zip(refs, (left, right), strict=True):
            _check_finite(ref, values)
        return left, right

    def added(self) -> np.ndarray:
        """float32 [out, in]."""
        left, right = self.factors()
        product = left @ right
        product *= np.float32(self.scaling)
        return np.asarray(product)


@dataclass(frozen=True)
class Bias:
    """`scaling * b`, added to a bias [out]."""

    b: TensorRef
    scaling: float

    def added(self) -> np.ndarray:
        """float32 [out]."""
        values = to_float32(self.b.map())
        _check_finite(self.b, values)
        return np.asarray(values * np.float32(self.scaling))


@dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of the base, or the one that the adapter has in its place, with what is added.

    start: where sums begin. replaced: whether that is the adapter's own, in the base's place.
    dtype: the base's. Sums are in float32, and are rounded once.
    """

    start: TensorSource
    dtype: str
    terms: tuple[LowRank | Bias, ...] = ()
    replaced: bool = False

    @property
    def path(self) -> Path:
        return self.start.path

    @property
    def file_tensor(self) -> str:
        return self.start.file_tensor

    @property
    def shape(self) -> Dims:
        return self.start.shape

    @property
    def nbytes(self) -> int:
        return self.size_in(self.dtype)

    def size_in(self, dtype: str) -> int:
        """Bytes in a type."""
        return int(np.prod(self.shape, dtype=np.int64)) * BY_NAME[dtype].itemsize

    def merged(self, start: np.ndarray | None = None) -> np.ndarray:
        """float32, not rounded to the base's type. start: what `self.start` holds, where it is
        known; it is not changed. Raises CheckpointError."""
        found = to_float32(self.start.read() if start is None else start)
        for term in self.terms:
            # The first sum makes an array of our own.
            found = found + term.added()
        return found

    def read(self) -> np.ndarray:
        with np.errstate(over="ignore"):  # infinite then, which a build refuses by name
            return self.merged().astype(BY_NAME[self.dtype], copy=False)


def _check_finite(ref: TensorRef, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{ref.path}: tensor {ref.file_tensor} holds NaN or infinite values; training "
            "diverged or the file is damaged, give an earlier step of the adapter"
        )
