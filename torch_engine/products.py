"""Matrices to multiply with, however they are kept, and the views of files that they start from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.dtypes import BFLOAT16
from torch_engine import native

# Rows from which widening a matrix to float32 costs less than a product that torch emulates
# (docs/results/2026-11-25-cpu-avx2.md).
WIDEN_FROM_ROWS = 16


class Weight(ABC):
    """A matrix [out, in].

    kernels: our own, where they multiply with it.
    """

    shape: tuple[int, ...]
    kernels: native.Kernels | None = None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the matrix, without padding."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """`x @ weight.T`: [rows, in] -> [rows, out]."""

    def multiply_runs(self, x: Tensor, starts: np.ndarray, weights: Sequence[Weight]) -> Tensor:
        """`linears` with weights of this class."""
        parts = zip(starts[:-1], starts[1:], weights, strict=True)
        return torch.cat([weight.multiply(x[a:b]) for a, b, weight in parts])


class PlainWeight(Weight):
    """A tensor as it is, multiplied by torch."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tuple(tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        if (
            len(x) >= WIDEN_FROM_ROWS
            and x.dtype == torch.bfloat16
            and not x.is_cuda
            and emulates_bfloat16()
        ):
            return F.linear(x.float(), self.tensor.float()).to(torch.bfloat16)
        return F.linear(x, self.tensor)


class PackedWeight(Weight):
    """A matrix in the layout of our own kernels; the original is not kept."""

    def __init__(self, weight: Tensor, kernels: native.Kernels):
        self.shape = (weight.shape[0], weight.shape[1])
        self.kernels = kernels
        self.packed = native.pack(weight)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.packed.element_size()

    def multiply(self, x: Tensor) -> Tensor:
        return self.multiply_runs(x, np.array([0, len(x)]), [self])

    def multiply_runs(self, x: Tensor, starts: np.ndarray, weights: Sequence[Weight]) -> Tensor:
        assert self.kernels is not None
        packed = [w.packed for w in weights if isinstance(w, PackedWeight)]
        return native.linears(self.kernels, x, starts, packed, self.shape[0])


@cache
def emulates_bfloat16() -> bool:
    """Whether this processor has no instructions that multiply bfloat16 as oneDNN wants them."""
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def pack_native(weight: Tensor) -> Weight:
    """A copy for our own kernels, which must be there; the argument can be dropped."""
    kernels = native.load(weight.dtype)
    assert kernels is not None
    return PackedWeight(weight, kernels)


def linears(x: Tensor, starts: np.ndarray, weights: Sequence[Weight]) -> Tensor:
    """Products of runs of rows, each with a matrix of its own of one shape.

    Adjacent runs with the same matrix are one. starts: int64 [runs + 1], on the host.
    """
    firsts = [i for i, weight in enumerate(weights) if not i or weight is not weights[i - 1]]
    if len(firsts) < len(weights):
        starts, weights = starts[[*firsts, -1]], [weights[i] for i in firsts]
    if len(weights) == 1:
        return weights[0].multiply(x)
    return weights[0].multiply_runs(x, starts, weights)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the same memory. The array may be a read-only mapping; the engine never writes to
    weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
