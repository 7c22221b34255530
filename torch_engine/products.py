"""Matrix products, with weights that may be packed once for oneDNN, and the views of files that they start from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.dtypes import BFLOAT16

# Rows that the packed layout is chosen for; measured at 1, 4, 16 and 256 rows (benchmarks/cpu_products.py).
PACK_FOR_ROWS = 16


@dataclass(frozen=True)
class PackedWeight:
    """A matrix `[out, in]` in oneDNN's blocked layout; the original is not kept."""

    data: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.data.element_size()


Weight = Tensor | PackedWeight


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and processor multiply packed weights of this type (bfloat16 needs AVX-512 or better)."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        packed = pack(torch.ones(32, 32, dtype=dtype))
        product = linear(torch.ones(2, 32, dtype=dtype), packed)
        return bool((product == 32).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack(weight: Tensor) -> PackedWeight:
    """Reorder `[out, in]` for products with few rows. A copy; the argument can be dropped."""
    data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_FOR_ROWS)
    return PackedWeight(data, (weight.shape[0], weight.shape[1]))


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [rows, in] -> [rows, out]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")
    return product


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the same memory. The array may be a read-only mapping; the engine never writes to weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
