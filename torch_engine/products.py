"""Matrix products, with weights that may be packed once for oneDNN, and the views of files that
they start from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.dtypes import BFLOAT16
from torch_engine import native

# Rows that the packed layout is chosen for; measured at 1, 4, 16 and 256 rows
# (benchmarks/cpu_products.py).
PACK_FOR_ROWS = 16

# Rows from which widening a matrix to float32 costs less than a product that torch emulates
# (docs/results/2026-11-25-cpu-avx2.md).
WIDEN_FROM_ROWS = 16


@dataclass(frozen=True)
class PackedWeight:
    """A matrix `[out, in]` in oneDNN's blocked layout, or in that of our own kernels where these do
    all products; the original is not kept.

    kernels, place: our own kernels and where they find it, if they can read it.
    """

    data: Tensor
    shape: tuple[int, int]
    kernels: native.Kernels | None = None
    place: native.Place | None = None

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.data.element_size()


Weight = Tensor | PackedWeight


@cache
def emulates_bfloat16() -> bool:
    """Whether this processor has no instructions that multiply bfloat16 as oneDNN wants them."""
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN, in this build and on this processor, multiplies packed weights of this
    type."""
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
    weight = weight.contiguous()
    data = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_FOR_ROWS)
    return PackedWeight(data, (weight.shape[0], weight.shape[1]))


def pack_native(weight: Tensor) -> PackedWeight:
    """`pack`, with our own kernels for few rows if they can read the result; for any number where
    they pack it."""
    weight = weight.contiguous()
    kernels = native.load(weight.dtype)
    if kernels is not None and kernels.own_layout:
        own = native.pack(weight)
        return PackedWeight(own, (weight.shape[0], weight.shape[1]), kernels, native.place_of(own))
    packed = pack(weight)
    place = native.locate(weight, packed.data) if kernels is not None else None
    return PackedWeight(packed.data, packed.shape, kernels if place is not None else None, place)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [rows, in] -> [rows, out]."""
    if isinstance(weight, Tensor):
        if (
            len(x) >= WIDEN_FROM_ROWS
            and x.dtype == torch.bfloat16
            and not x.is_cuda
            and emulates_bfloat16()
        ):
            return F.linear(x.float(), weight.float()).to(torch.bfloat16)
        return F.linear(x, weight)
    if (
        weight.kernels is not None
        and weight.place is not None
        and len(x) <= weight.kernels.max_rows
    ):
        return native.linear(weight.kernels, x, weight.place, weight.shape[0])
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")
    return product


def linears(x: Tensor, starts: np.ndarray, weights: Sequence[Weight]) -> Tensor:
    """`linear` for runs of rows, each with a matrix of its own of one shape. starts: int64 [runs +
    1], on the host.

    Adjacent runs with the same matrix are one.
    """
    firsts = [i for i, weight in enumerate(weights) if not i or weight is not weights[i - 1]]
    if len(firsts) < len(weights):
        starts, weights = starts[[*firsts, -1]], [weights[i] for i in firsts]
    first = weights[0]
    if len(weights) == 1:
        return linear(x, first)
    if isinstance(first, PackedWeight) and first.kernels is not None:
        places = [w.place for w in weights if isinstance(w, PackedWeight) and w.place is not None]
        if (
            len(places) == len(weights)
            and len({place.stride for place in places}) == 1
            and np.diff(starts).max() <= first.kernels.max_rows
        ):
            return native.linears(first.kernels, x, starts, places, first.shape[0])
    return torch.cat(
        [linear(x[a:b], w) for a, b, w in zip(starts[:-1], starts[1:], weights, strict=True)]
    )


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor on the same memory. The array may be a read-only mapping; the engine never writes to
    weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
