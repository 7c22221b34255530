"""torch's grouped product, where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def find_grouped_mm() -> Callable[..., Tensor] | None:
    """`torch.nn.functional.grouped_mm`, public since torch 2.10, or its private forerunner."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped_mm_fits(
    hidden_size: int, intermediate_size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the grouped product takes these shapes: strides in multiples of 16 bytes, on CUDA
    bfloat16 alone."""
    step = 16 // dtype.itemsize
    aligned = hidden_size % step == 0 and intermediate_size % step == 0
    return (
        find_grouped_mm() is not None
        and aligned
        and (device.type != "cuda" or dtype == torch.bfloat16)
    )
