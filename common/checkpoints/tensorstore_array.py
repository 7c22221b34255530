"""Arrays on disk, read and written through TensorStore: what the T5X and the Orbax format have in
common.

TensorStore is imported on first use, so that those who read safetensors alone need not have it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.dtypes import BFLOAT16, BY_NAME
from common.errors import CheckpointError
from common.families import Dims

# TensorStore raises these for files that are missing, damaged or cannot be written.
FAULTS = (ValueError, OSError, KeyError, NotImplementedError)

# T5X cuts chunks across all experts of a layer, so that one expert alone means decoding them all.
# Experts are read in blocks of at most so many bytes, a few blocks are kept, and each goes when its
# last expert has been handed out.
BLOCK_BYTES = 256 << 20
KEPT_BYTES = 3 * BLOCK_BYTES


def require(module: str) -> Any:
    """Import tensorstore or msgpack. Raises CheckpointError that says how to install them."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"T5X and Orbax checkpoints need the package {module}, which is not installed: pip "
            "install 'moetel[jax]'"
        ) from error


def explain(error: BaseException) -> str:
    """The part of a TensorStore error that helps a reader: without its source locations."""
    return str(error.args[0] if error.args else error).split(" [", 1)[0]


class ArrayOnDisk(Protocol):
    """An array as its format holds it. `chunk_rows`: how many indices of the first axis share a
    chunk."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Dims: ...
    @property
    def chunk_rows(self) -> int: ...

    def read(self, rows: slice | None = None) -> np.ndarray:
        """The array, or some indices of its first axis. Raises CheckpointError."""
        ...


@dataclass(frozen=True)
class InlineArray:
    """An array whose bytes stand in the index file itself."""

    path: Path
    name: str
    data: np.ndarray

    @property
    def dtype(self) -> str:
        return self.data.dtype.name

    @property
    def shape(self) -> Dims:
        return self.data.shape

    @property
    def chunk_rows(self) -> int:
        return 1

    def read(self, rows: slice | None = None) -> np.ndarray:
        return (self.data if rows is None else self.data[rows]).copy()


@dataclass(frozen=True)
class StoredArray:
    """An opened zarr array. `bits` marks uint16 that holds the bits of bfloat16."""

    path: Path
    name: str
    dtype: str
    shape: Dims
    chunk_rows: int
    handle: Any
    bits: bool = False

    def read(self, rows: slice | None = None) -> np.ndarray:
        try:
            data = (
                self.handle.read().result() if rows is None else self.handle[rows].read().result()
            )
        except FAULTS as error:
            raise CheckpointError(
                f"{self.path}: array {self.name} cannot be read ({explain(error)}); "
                "a file is missing or damaged, copy the checkpoint again"
            ) from error
        array = np.asarray(data)
        found: np.ndarray = array.view(BFLOAT16) if self.bits else array
        return found


def open_array(
    spec: Mapping[str, Any], path: Path, name: str, *, bits: bool = False, context: Any = None
) -> StoredArray:
    """Open an array that exists. `spec`: driver and kvstore, as TensorStore takes them.

    path, name: for errors. bits: take uint16 for the bits of bfloat16. Raises CheckpointError if it
    is absent, its metadata is damaged or it holds no floats.
    """
    ts = require("tensorstore")
    try:
        # A lost chunk would read as zeros otherwise.
        full = {"fill_missing_data_reads": False, "recheck_cached_data": False, **spec}
        handle = ts.open(full, open=True, read=True, context=context or ts.Context()).result()
    except FAULTS as error:
        raise CheckpointError(
            f"{path}: array {name} cannot be opened ({explain(error)}); "
            "the checkpoint is incomplete or damaged, copy it again"
        ) from error
    dtype = handle.dtype.name
    bits = bits and dtype == "uint16"
    if bits:
        dtype = "bfloat16"
    if dtype not in BY_NAME:
        raise CheckpointError(
            f"{path}: array {name} has type {dtype}; weights must be float32, bfloat16 or float16"
        )
    chunk = handle.chunk_layout.read_chunk.shape
    return StoredArray(
        path, name, dtype, tuple(handle.shape), int(chunk[0]) if chunk else 1, handle, bits
    )


def write_array(spec: Mapping[str, Any], path: Path, array: np.ndarray) -> None:
    """Create one array and write it. `spec`: driver, kvstore and metadata. Raises OSError, a full
    disk included."""
    ts = require("tensorstore")
    try:
        handle = ts.open(
            {**spec, "dtype": array.dtype.name}, create=True, open=False, context=ts.Context()
        ).result()
        handle.write(array).result()
    except FAULTS as error:
        raise OSError(f"{path}: {explain(error)}") from error


def even_chunks(shape: Dims, max_elements: int) -> list[int]:
    """A chunk shape that divides `shape` evenly with at most `max_elements`, cutting the largest
    axis first.

    So does T5X (t5x/checkpoints.py, `_choose_chunk_shape`), whose partitioned readers want whole
    chunks.
    """
    chunk = list(shape)
    while math.prod(chunk) > max_elements:
        axis = chunk.index(max(chunk))
        chunk[axis] = next(n for n in range(chunk[axis] - 1, 0, -1) if shape[axis] % n == 0)
    return chunk


@dataclass
class _Block:
    waiting: set[int]
    lock: threading.Lock = field(default_factory=threading.Lock)
    data: np.ndarray | None = None


class ExpertBlocks:
    """Hands out single experts of arrays [experts, in, out] and decodes shared chunks as seldom as
    memory allows.

    Made for readers that take the experts in order, each once. Holds at most `KEPT_BYTES`, or one
    block if larger.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[str, int], _Block] = OrderedDict()

    def expert(self, array: ArrayOnDisk, index: int) -> np.ndarray:
        """[in, out], possibly a view of a block: copy it before keeping it."""
        if array.chunk_rows == 1:
            alone: np.ndarray = array.read(slice(index, index + 1))[0]
            return alone
        each = math.prod(array.shape[1:]) * BY_NAME[array.dtype].itemsize
        rows = max(1, min(array.shape[0], BLOCK_BYTES // max(1, each)))
        start = index // rows * rows
        stop = min(start + rows, array.shape[0])
        key = (array.name, start)
        with self._lock:
            block = self._blocks.setdefault(key, _Block(set(range(start, stop))))
            self._blocks.move_to_end(key)
        with block.lock:
            if block.data is None:
                block.data = array.read(slice(start, stop))
            found: np.ndarray = block.data[index - start]
        with self._lock:
            block.waiting.discard(index)
            if not block.waiting:
                self._blocks.pop(key, None)
            self._evict()
        return found

    def _evict(self) -> None:
        sizes = {
            key: 0 if block.data is None else block.data.nbytes
            for key, block in self._blocks.items()
        }
        held = sum(sizes.values())
        for key in list(self._blocks)[:-1]:
            if held <= KEPT_BYTES:
                break
            held -= sizes[key]
            del self._blocks[key]


@dataclass(frozen=True)
class LazyTensor:
    """A canonical tensor [out, in] as (one expert of) an array that may lie the other way round on
    disk."""

    array: ArrayOnDisk
    shape: Dims
    transposed: bool
    expert: int | None
    blocks: ExpertBlocks = field(repr=False, compare=False)

    @property
    def path(self) -> Path:
        return self.array.path

    @property
    def file_tensor(self) -> str:
        return self.array.name if self.expert is None else f"{self.array.name}[{self.expert}]"

    @property
    def dtype(self) -> str:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BY_NAME[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """C-contiguous, of this tensor's shape and type; memory of its own. Raises
        CheckpointError."""
        if self.expert is None:
            whole = self.array.read()
            return np.ascontiguousarray(whole.T if self.transposed else whole)
        part = self.blocks.expert(self.array, self.expert)
        return np.array(part.T if self.transposed else part, order="C", copy=True)
