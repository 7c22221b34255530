"""Our own CPU kernels for the torch engine (`common/kernels`), with torch's threads (`openmp.cc`).

With few rows a product is bound by reading the weights. The kernels read each packed matrix once,
with all rows at hand, and a layer of experts starts threads once. Nothing depends on them: without
a compiler, on another processor, or with MOETEL_NATIVE=0 in the environment, torch does all
products.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.kernels import build, packed_weights
from common.kernels.library import ExpertsCall, Library, Threads
from common.kernels.packed_weights import ACTIVATIONS, TYPES

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("openmp.cc")

_TYPES = {torch.float32: TYPES["float32"], torch.bfloat16: TYPES["bfloat16"]}


@dataclass(frozen=True)
class Kernels:
    """The kernels. target: the instructions that they use."""

    library: Library

    @property
    def target(self) -> str:
        return self.library.target

    def threads(self) -> Threads:
        return _threads(self.library.functions)


def _threads(functions: ctypes.CDLL) -> Threads:
    run = ctypes.cast(functions.moetel_openmp, ctypes.c_void_p)
    return Threads(run, None, torch.get_num_threads())


def _share_openmp() -> None:
    """Let the kernels find the OpenMP runtime that torch has loaded: both share its threads."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libgomp" in line:
            ctypes.CDLL(line.split()[-1], mode=ctypes.RTLD_GLOBAL)
            break


def load(dtype: torch.dtype) -> Kernels | None:
    """The kernels if they multiply a type and can be had; else None, and the reason is logged.

    Raises:
        EngineError: the environment's MOETEL_NATIVE is malformed.
    """
    return _load() if dtype in _TYPES else None


@cache
def _load() -> Kernels | None:
    try:
        return Kernels(build.load(SOURCE, ("-fopenmp",), _share_openmp, _threads))
    except build.Unavailable as error:
        logger.info("own CPU kernels are not used: %s", error)
        return None


def pack(weight: Tensor) -> Tensor:
    """[N, K] in the kernels' layout (`common.kernels.packed_weights.pack`)."""
    itemsize = weight.element_size()
    words = weight.contiguous().view(torch.int16 if itemsize == 2 else torch.int32).numpy()
    return torch.from_numpy(packed_weights.pack(words)).view(weight.dtype)


def addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """uint64 [tensors], where each one's numbers begin. The tensors must be kept alive."""
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


def linears(
    kernels: Kernels, x: Tensor, starts: np.ndarray, packed: Sequence[Tensor], out_features: int
) -> Tensor:
    """Products of runs of rows, each with a packed matrix of its own of one shape.

    starts: int64 [runs + 1], where each run's rows begin.
    """
    x = x.contiguous()
    out = torch.empty(len(x), out_features, dtype=x.dtype)
    kind, matrices = _TYPES[x.dtype], addresses(packed)
    kernels.library.functions.moetel_linears(
        kernels.threads(), kind, _TYPES[packed[0].dtype], x.data_ptr(), x.shape[1], len(packed),
        matrices.ctypes.data, out_features, starts.ctypes.data, out.data_ptr(),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Residuals:
    """What stands beside a layer's copies: the table of `kernels.h`, int32 [numbers, 3, parts, 6],
    and the records that it names, uint8 [bytes]."""

    table: np.ndarray
    records: Tensor


def experts(
    kernels: Kernels,
    x: Tensor,
    chosen: np.ndarray,
    gates: Tensor,
    weights: np.ndarray,
    intermediate_size: int,
    activation: str,
    residuals: Residuals | None = None,
) -> Tensor:
    """The weighted sum of each token's experts: [T, H] -> [T, H], gated feed-forwards.

    Args:
        chosen: int32 [T, top_k], numbers as `kernels.h` explains them; another than there are
            stands for no expert.
        gates: float32 [T, top_k].
        weights: uint64 [slots, 3], addresses of packed gate, up and down matrices.
    """
    x, gates = x.contiguous(), gates.contiguous()
    (tokens, hidden), top_k, slots = x.shape, gates.shape[1], len(weights)
    out = torch.empty_like(x)
    size = tokens * top_k * (intermediate_size * x.element_size() + 4 * hidden)
    scratch = torch.empty(size, dtype=torch.uint8)
    call = ExpertsCall(
        _TYPES[x.dtype], _TYPES[x.dtype], ACTIVATIONS[activation], True, tokens, top_k, hidden,
        intermediate_size, hidden, slots, slots, x.data_ptr(), chosen.ctypes.data,
        gates.data_ptr(), weights.ctypes.data, out.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    if residuals is not None:
        call.numbers, _, call.parts, _ = residuals.table.shape
        call.table, call.records = residuals.table.ctypes.data, residuals.records.data_ptr()
        call.words = residuals.records.numel() // 4
    kernels.library.experts(kernels.threads(), call)
    return out


def rms_norms(
    kernels: Kernels, x: Tensor, starts: np.ndarray, weights: Sequence[Tensor], eps: np.ndarray
) -> Tensor:
    """RMS norms of several runs of rows, each with a weight and an epsilon of its own.

    starts: int64 [runs + 1], where each run's rows begin. eps: float32 [runs].
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    pointers = addresses(weights)
    kernels.library.functions.moetel_rms_norms(
        kernels.threads(), _TYPES[x.dtype], x.data_ptr(), x.shape[1], len(weights),
        pointers.ctypes.data, eps.ctypes.data, starts.ctypes.data, out.data_ptr(),
    )  # fmt: skip
    return out


def decode_attention(
    kernels: Kernels,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: int,
    tables: list[np.ndarray],
    block: int,
    lengths: np.ndarray,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of one new token a row, itself in the cache already: [B, N, D] -> [B, N * D].

    Args:
        keys, values: a layer's cache [tokens, groups * D or more], the last axis contiguous.
        tables: for each row int64, the numbers of its blocks of `block` tokens.
        lengths: int64 [B].
        scale: of the products of queries and keys.
    """
    rows, heads, size = q.shape
    lengths = np.ascontiguousarray(lengths)
    places = np.array([table.ctypes.data for table in tables], dtype=np.int64)
    out = torch.empty(rows, heads * size, dtype=q.dtype)
    kernels.library.functions.moetel_attention(
        kernels.threads(), _TYPES[q.dtype], q.data_ptr(), q.stride(0), keys.data_ptr(),
        values.data_ptr(), keys.stride(0), places.ctypes.data, block, rows, groups,
        heads // groups, size, lengths.ctypes.data,
        int(lengths.max()) if window is None else window, scale, out.data_ptr(),
    )  # fmt: skip
    return out
