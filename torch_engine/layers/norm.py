"""Root-mean-square norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_engine import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H]; the mean square in float32, the product with the weight in the type of x (as
    transformers rounds)."""
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True).add_(eps))
    return scaled.to(x.dtype).mul_(weight)


def rms_norms(
    kernels: native.Kernels | None,
    x: Tensor,
    starts: np.ndarray,
    weights: Sequence[Tensor],
    eps: Sequence[float],
) -> Tensor:
    """`rms_norm` of runs of rows, each with a weight and an epsilon of its own, in one call of our
    own kernels where they are used.

    starts: int64 [runs + 1], where each run's rows begin.
    """
    if kernels is not None:
        return native.rms_norms(kernels, x, starts, weights, np.array(eps, dtype=np.float32))
    parts = [
        rms_norm(x[start:stop], weight, e)
        for start, stop, weight, e in zip(starts[:-1], starts[1:], weights, eps, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
