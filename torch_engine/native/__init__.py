"""Our own CPU kernels for few rows (kernels.c, with common/native/residuals.h): compiled once with
the machine's C compiler, used where they prove right.

They are compiled for AVX-512 or AVX2 (common/native). They read weights in the layout that oneDNN
packs them in, so
one packed copy serves both: these kernels for decoding, oneDNN for long prompts. Where oneDNN has
another layout or none, as for bfloat16 on processors that do not multiply it, weights are packed
here and these kernels do everything; oneDNN would be several times slower at any number of rows.
Nothing depends on them: without a compiler, on another processor, or with MOETEL_NATIVE=0 in the
    environment, oneDNN or torch does all products.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.native import HEADERS, Target, cpu_flags, find_target, one_process, switched_off
from common.plan.residual import SIGN, Part

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-fno-math-errno", "-fopenmp", "-fPIC")
BLOCK = 64  # outputs in a block of the packed layout

# Numbers of `activate` in kernels.c, by the names of `pool.ACTIVATIONS`.
ACTIVATION_NUMBERS = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass(frozen=True)
class Kernels:
    """The functions for one type.

    max_rows: up to how many rows a matrix they are the faster choice here. own_layout: whether
        weights are packed by
    `pack` and not by oneDNN. target: the instructions that they use.
    """

    linears: Any
    experts: Any
    residual: Any
    rms_norm: Any
    attention: Any
    max_rows: int
    target: str
    own_layout: bool = False


def _compile(target: Target) -> ctypes.CDLL:
    """Compile kernels.c into the user's cache, or take what is there. Raises OSError or
    subprocess.SubprocessError."""
    compiler = next((c for c in (os.environ.get("CC"), "gcc", "cc") if c and shutil.which(c)), None)
    if compiler is None:
        raise OSError("no C compiler (gcc or cc) found")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    flags = (*FLAGS, *target.flags)
    sources = [path.read_bytes() for path in (SOURCE, *HEADERS)]
    key = repr((sources, flags, version, sorted(cpu_flags())))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetel"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    with one_process(folder):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                obj, library = Path(scratch) / "kernels.o", Path(scratch) / name
                # Linked without an OpenMP runtime: the calls resolve to the one that torch has
                # loaded, so that both share threads.
                for command in (
                    [
                        compiler,
                        *flags,
                        "-iquote",
                        str(HEADERS[0].parent),
                        "-c",
                        str(SOURCE),
                        "-o",
                        str(obj),
                    ],
                    [compiler, "-shared", str(obj), "-o", str(library), "-lm"],
                ):
                    subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
                os.replace(library, path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libgomp" in line:
            ctypes.CDLL(line.split()[-1], mode=ctypes.RTLD_GLOBAL)
            break
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)


@cache
def load(dtype: torch.dtype) -> Kernels | None:
    """The kernels for a type, or None where they cannot be had; the reason is logged.

    Raises EngineError if the environment's MOETEL_NATIVE is malformed.
    """
    if dtype not in _SUFFIX:
        return None
    target = "they are switched off" if switched_off() else find_target()
    if isinstance(target, str):
        logger.info("own CPU kernels are not used: %s", target)
        return None
    try:
        library = _compile(target)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("own CPU kernels are not used: %s", error)
        return None
    size, pointer = ctypes.c_long, ctypes.c_void_p
    linears, experts, residual, rms_norm, attention = (
        getattr(library, f"moetel_{name}_{_SUFFIX[dtype]}")
        for name in ("linears", "experts", "residual", "rms_norm", "attention")
    )
    linears.argtypes = [pointer, size, size, pointer, size, size, pointer, pointer, ctypes.c_int]
    experts.argtypes = [
        pointer,
        *[size] * 5,
        pointer,
        size,
        pointer,
        size,
        *[pointer] * 4,
        ctypes.c_int,
        *[pointer] * 3,
        ctypes.c_int,
        pointer,
        size,
        pointer,
        pointer,
    ]
    residual.argtypes = [pointer, size, pointer, size, pointer, size, pointer, ctypes.c_int]
    rms_norm.argtypes = [pointer, size, size, pointer, pointer, pointer, pointer]
    attention.argtypes = [
        pointer,
        size,
        pointer,
        pointer,
        size,
        pointer,
        *[size] * 5,
        pointer,
        size,
        size,
        ctypes.c_float,
        pointer,
        pointer,
        ctypes.c_int,
    ]
    for function in (linears, experts, residual, rms_norm, attention):
        function.restype = None
    own_layout = not _shares_layout(dtype)
    max_rows = 2**31 - 1
    if not own_layout:
        # With AMX oneDNN multiplies several times faster than these kernels once products are bound
        # by arithmetic.
        max_rows = 16 if dtype == torch.bfloat16 and "amx_bf16" in cpu_flags() else 96
    kernels = Kernels(
        linears, experts, residual, rms_norm, attention, max_rows, target.name, own_layout
    )
    if not _proves_right(kernels, dtype):
        logger.warning("own CPU kernels are not used: a product differs from torch's")
        return None
    return kernels


def _proves_right(kernels: Kernels, dtype: torch.dtype) -> bool:
    """Whether a product with a packed weight equals torch's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 70, generator=generator).to(dtype)
    x = torch.randn(7, 70, generator=generator).to(dtype)
    place: Place | None
    if kernels.own_layout:
        packed = pack(weight)
        place = place_of(packed)
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        place = locate(weight, packed)
    if place is None:
        return False
    found = linear(kernels, x, place, 100)
    exact = x.double() @ weight.double().T
    return bool(
        torch.allclose(
            found.double(), exact, atol=0.1 if dtype == torch.bfloat16 else 1e-3, rtol=1e-2
        )
    )


@dataclass(frozen=True)
class Place:
    """Where a packed weight's bytes lie, and how many inputs a block has, padding counted."""

    pointer: int
    stride: int


def _shares_layout(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type here, with weights in the layout that these kernels
    read."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.randn(100, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        return locate(weight, torch.ops.mkldnn._reorder_linear_weight(weight, 16)) is not None
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def pack(weight: Tensor) -> Tensor:
    """A matrix [out, in] in the kernels' layout: float32 [blocks, in, BLOCK, 1], bfloat16 [blocks,
    in / 2, BLOCK, 2].

    Outputs are padded to whole blocks, and bfloat16 inputs to whole pairs, with zeros.
    """
    rows, inputs = weight.shape
    lanes = 2 if weight.element_size() == 2 else 1
    steps = -(-inputs // lanes)
    groups = torch.nn.functional.pad(weight, (0, steps * lanes - inputs)).view(rows, steps, lanes)
    blocks, rest = divmod(rows, BLOCK)
    packed = torch.zeros(blocks + (rest > 0), steps, BLOCK, lanes, dtype=weight.dtype)
    packed[:blocks] = groups[: blocks * BLOCK].view(blocks, BLOCK, steps, lanes).transpose(1, 2)
    if rest:
        packed[blocks, :, :rest] = groups[blocks * BLOCK :].transpose(0, 1)
    return packed


def place_of(packed: Tensor) -> Place:
    """Where the kernels find what `pack` gave, which must be kept as long as they do."""
    return Place(packed.data_ptr(), packed.shape[1] * packed.shape[3])


def locate(weight: Tensor, packed: Tensor) -> Place | None:
    """The place of a packed weight if the kernels can read its layout, checked on its first and
    last block."""
    rows, inputs = weight.shape
    try:
        pointer, nbytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    except (AttributeError, RuntimeError):
        return None
    blocks = -(-rows // BLOCK)
    itemsize = weight.element_size()
    stride, rest = divmod(nbytes, blocks * BLOCK * itemsize)
    lanes = 2 if itemsize == 2 else 1
    if rest or stride < inputs or stride % lanes or inputs % lanes:
        return None
    integer: type = np.uint16 if itemsize == 2 else np.uint32
    raw: np.ndarray = np.frombuffer(
        (ctypes.c_char * nbytes).from_address(pointer), dtype=integer
    ).reshape(blocks, -1, BLOCK, lanes)
    for block in {0, blocks - 1}:
        part = weight[block * BLOCK : (block + 1) * BLOCK]
        expected = np.zeros((BLOCK, stride), dtype=integer)
        bits: np.ndarray = (
            part.contiguous()
            .view(torch.int16 if itemsize == 2 else torch.int32)
            .numpy()
            .view(integer)
        )
        expected[: len(part), :inputs] = bits
        if not np.array_equal(raw[block], expected.reshape(BLOCK, -1, lanes).transpose(1, 0, 2)):
            return None
    return Place(pointer, stride)


def linear(kernels: Kernels, x: Tensor, place: Place, out_features: int) -> Tensor:
    """`x @ weight.T` for few rows: [rows, in] -> [rows, out]."""
    return linears(kernels, x, np.array([0, len(x)], dtype=np.int64), [place], out_features)


def linears(
    kernels: Kernels, x: Tensor, starts: np.ndarray, places: Sequence[Place], out_features: int
) -> Tensor:
    """`linear` for several runs of rows, each with a matrix of its own of one shape and stride, in
    one call.

    starts: int64 [runs + 1], where each run's rows begin.
    """
    x = x.contiguous()
    out = torch.empty(len(x), out_features, dtype=x.dtype)
    pointers = np.array([place.pointer for place in places], dtype=np.uint64)
    kernels.linears(
        x.data_ptr(),
        x.shape[1],
        len(places),
        pointers.ctypes.data,
        places[0].stride,
        out_features,
        starts.ctypes.data,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


class Residual:
    """The parts of one expert's residual as the kernels take them. Keeps their bytes alive.

    data: uint8 [bytes], the record. matrices: for the gate, up and down projections, the parts with
    where each begins, and the matrix's shape [out, in].
    """

    def __init__(
        self, data: Tensor, matrices: Sequence[tuple[Sequence[tuple[Part, int]], tuple[int, ...]]]
    ):
        self._data = data
        self.counts = [len(parts) for parts, _ in matrices]
        # Values of the first step that each matrix has for a row.
        self.widths = [
            sum(1 if p.kind == SIGN else p.size for p, _ in parts) for parts, _ in matrices
        ]
        self.width = max(self.widths[0] + self.widths[1], self.widths[2])
        rows = [
            (data.data_ptr() + offset, int(part.kind != SIGN), part.bits, part.size, *shape)
            for parts, shape in matrices
            for part, offset in parts
        ]
        self.parts = np.array(rows, dtype=np.int64).reshape(-1, 6)  # `residual_part` of residuals.h

    def place(self, matrix: int) -> int:
        """Address of the first part of a matrix: 0 gate, 1 up, 2 down."""
        return int(self.parts.ctypes.data) + sum(self.counts[:matrix]) * self.parts.itemsize * 6


def add_residual(kernels: Kernels, residual: Residual, matrix: int, x: Tensor, y: Tensor) -> None:
    """y float32 [rows, out] += x [rows, in] R^T for one matrix (0 gate, 1 up, 2 down) that has
    parts."""
    x = x.contiguous()
    width = residual.widths[matrix]
    scratch = torch.empty(len(x) * width, dtype=torch.float32)
    kernels.residual(
        residual.place(matrix),
        residual.counts[matrix],
        x.data_ptr(),
        len(x),
        scratch.data_ptr(),
        width,
        y.data_ptr(),
        torch.get_num_threads(),
    )


def experts(
    kernels: Kernels,
    x: Tensor,
    gate_up: Sequence[Place],
    down: Sequence[Place],
    intermediate_size: int,
    starts: np.ndarray,
    tokens: np.ndarray,
    places: np.ndarray,
    gates: Tensor,
    activation: str,
    residuals: Sequence[tuple[int, int, Residual]] = (),
) -> Tensor:
    """The weighted sum of each token's experts: [T, H] -> [T, H].

    Rows are (token, choice) pairs sorted by expert. gate_up, down: the matrices of each expert that
    is hit; starts: int64 [groups + 1], where its rows begin; tokens: int64 [rows]; places: int64
    [T, top_k], the row of each choice;
    gates: float32 [T, top_k]. residuals: first row, end, and what is added there; in order, none
        across two experts.
    """
    x, gates = x.contiguous(), gates.contiguous()
    num_rows = len(tokens)
    inner = torch.empty(num_rows, intermediate_size, dtype=x.dtype)
    partial = torch.empty(num_rows, x.shape[1], dtype=torch.float32)
    out = torch.empty_like(x)
    table, firsts, scratch = None, None, None
    if residuals:
        sizes = [(stop - start) * r.width for start, stop, r in residuals]
        offsets = [0, *accumulate(sizes)]
        table = np.array(
            [
                (start, stop, r.place(0), *r.counts, offset, r.width)
                for (start, stop, r), offset in zip(residuals, offsets, strict=False)
            ],
            dtype=np.int64,
        )  # `row_residual` of kernels.c
        firsts = np.searchsorted(table[:, 0], starts).astype(np.int64, copy=False)
        scratch = torch.empty(offsets[-1], dtype=torch.float32)
    first, second = (
        np.array([p.pointer for p in places_of], dtype=np.uint64) for places_of in (gate_up, down)
    )
    kernels.experts(
        x.data_ptr(),
        len(x),
        x.shape[1],
        intermediate_size,
        gates.shape[1],
        len(gate_up),
        first.ctypes.data,
        gate_up[0].stride,
        second.ctypes.data,
        down[0].stride,
        starts.ctypes.data,
        tokens.ctypes.data,
        places.ctypes.data,
        gates.data_ptr(),
        ACTIVATION_NUMBERS[activation],
        inner.data_ptr(),
        partial.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
        None if table is None else table.ctypes.data,
        len(residuals),
        None if firsts is None else firsts.ctypes.data,
        None if scratch is None else scratch.data_ptr(),
    )
    return out


def rms_norms(
    kernels: Kernels, x: Tensor, starts: np.ndarray, weights: Sequence[Tensor], eps: np.ndarray
) -> Tensor:
    """RMS norms of several runs of rows, each with a weight and an epsilon of its own.

    starts: int64 [runs + 1], where each run's rows begin. eps: float32 [runs].
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    pointers = np.array([weight.data_ptr() for weight in weights], dtype=np.uint64)
    kernels.rms_norm(
        x.data_ptr(),
        x.shape[1],
        len(weights),
        pointers.ctypes.data,
        eps.ctypes.data,
        starts.ctypes.data,
        out.data_ptr(),
    )
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

    keys, values: a layer's cache [tokens, groups * D or more], the last axis contiguous. tables:
        for each row int64,
    the numbers of its blocks of `block` tokens. lengths: int64 [B]. scale: of the products.
    """
    rows, heads, size = q.shape
    longest = int(lengths.max())
    lengths = np.ascontiguousarray(lengths)
    places = np.array([table.ctypes.data for table in tables], dtype=np.int64)
    scores = torch.empty(rows * heads * longest, dtype=torch.float32)
    out = torch.empty(rows, heads * size, dtype=q.dtype)
    kernels.attention(
        q.data_ptr(),
        q.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        places.ctypes.data,
        block,
        rows,
        groups,
        heads // groups,
        size,
        lengths.ctypes.data,
        longest,
        longest if window is None else window,
        scale,
        scores.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
