"""The three float types of weights, by the names that configs use."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)

BY_NAME: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


def common_dtype(names: list[str]) -> str:
    """The narrowest of the three types that holds every value of all named types: itself if one,
    else float32.

    bfloat16 and float16 together need float32: one has the larger exponent, the other the longer
    mantissa.
    """
    return names[0] if len(set(names)) == 1 else "float32"


def is_lossless(source: str, target: str) -> bool:
    """Whether every value of type `source` is also a value of type `target`."""
    return source == target or target == "float32"


# Matrices of so many weights and more are compared and fitted in single precision: half the time,
# and still far finer than what models of that size are stored in.
LARGE = 1 << 20


def working(size: int) -> np.dtype[Any]:
    """The type in which matrices of `size` weights are compared and fitted."""
    return np.dtype(np.float32 if size >= LARGE else np.float64)


def to_float32(array: np.ndarray) -> np.ndarray:
    """The same values in float32. bfloat16 is widened by shifting bits, which is several times
    faster than a cast."""
    if array.dtype == np.float32:
        return array
    if array.dtype == BFLOAT16:
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(np.float32)
