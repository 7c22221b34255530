"""One safetensors file, read by tensor without loading the rest.

The header is checked by the `safetensors` library (sizes, overlaps, truncation); the offsets that
it does not hand out are read from the header itself (format: huggingface/safetensors README,
"Format": 8 bytes little-endian header size, JSON, data), so that a tensor can be mapped in place,
bfloat16 included.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.checkpoints.mapped_file import MappedFile
from common.dtypes import BY_NAME, to_float32
from common.errors import CheckpointError
from common.families import Dims, Region


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie: `nbytes` at `offset` of `path`, C order, little endian.

    file: what tensors of one file share, so that they share its mapping; None: each maps the file
        for itself, and its pages go with the array.
    """

    path: Path
    file_tensor: str
    dtype: str
    shape: Dims
    offset: int  # of a type that weights do not have, `dtype` is the header's code
    file: MappedFile | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * _TYPES[self.dtype].itemsize

    def map(self) -> np.ndarray:
        """A read-only view of the file; pages are read when touched. The mapping lives as long as
        an array of the file."""
        file = self.file or MappedFile(self.path)
        try:
            found = file.part(self.offset, self.nbytes)
            return found.view(_TYPES[self.dtype]).reshape(self.shape)
        except OSError as error:
            raise self._failed("mapped", error) from error

    def read(self) -> np.ndarray:
        """A copy in memory of our own, so that no page of the file stays counted to this
        process."""
        out = np.empty(self.shape, dtype=_TYPES[self.dtype])
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                view = memoryview(out.reshape(-1).view(np.uint8).data)
                done = 0
                while done < len(view):
                    got = file.readinto(view[done:])
                    if not got:
                        raise CheckpointError(
                            f"{self.path}: tensor {self.file_tensor} ends after {done} of "
                            f"{len(view)} bytes; "
                            "the file changed or is truncated, fetch it again"
                        )
                    done += got
        except OSError as error:
            raise self._failed("read", error) from error
        return out

    def _failed(self, what: str, error: OSError) -> CheckpointError:
        if isinstance(error, FileNotFoundError):
            return CheckpointError(
                f"{self.path}: the file is missing; restore it from a backup, or fetch it again"
            )
        return CheckpointError(f"{self.path}: tensor {self.file_tensor} cannot be {what}: {error}")

    def at(self, region: Region) -> TensorRef:
        """The part of this tensor that a region names."""
        if region.index is None or region.rows is None:
            return self
        _, rows, columns = self.shape
        itemsize = _TYPES[self.dtype].itemsize
        start = (region.index * rows + region.rows[0]) * columns * itemsize
        return replace(self, shape=region.shape, offset=self.offset + start)

    def check_type(self) -> None:
        """Raises CheckpointError if the values are not of one of the three types that weights
        have."""
        if self.dtype in BY_NAME:
            return
        if self.dtype == "F64":
            why = (
                "is float64 (F64); convert it to float32, which holds what a model needs, "
                "and save it again"
            )
        else:
            why = (
                f"has type {self.dtype}; weights must be F32, F16 or BF16 "
                "(quantised checkpoints are not supported, give the original)"
            )
        raise CheckpointError(f"{self.path}: tensor {self.file_tensor} {why}")

    def chunks(self, chunk_bytes: int = 16 << 20) -> Iterator[np.ndarray]:
        """The values in order, float32, at most `chunk_bytes` of the file at a time. Raises
        CheckpointError."""
        step = max(1, chunk_bytes // _TYPES[self.dtype].itemsize)
        size = math.prod(self.shape)
        for start in range(0, size, step):
            offset = self.offset + start * _TYPES[self.dtype].itemsize
            part = replace(self, shape=(min(step, size - start),), offset=offset)
            yield to_float32(part.read())


def same_values(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors hold equal numbers, whatever their types; memory for one chunk of each.

    NaN equals nothing. Raises CheckpointError.
    """
    if a.shape != b.shape:
        return False
    return all(np.array_equal(x, y) for x, y in zip(a.chunks(), b.chunks(), strict=True))


# Weights are floats; a store's own files also hold bytes.
_TYPES: dict[str, np.dtype[Any]] = {**BY_NAME, "uint8": np.dtype(np.uint8)}
_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
}  # by the codes of the header

_LFS = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError if a file holds git-lfs's pointer to its content in place of that."""
    try:
        with open(path, "rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError:
        return  # whoever reads it says why
    if pointer:
        raise CheckpointError(
            f"{path}: is a git-lfs pointer, the file itself was never fetched; "
            "run `git lfs pull` in the repository that it comes from"
        )


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one file, of any type: `TensorRef.check_type` refuses what is none of weights.

    Raises CheckpointError if it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again")
    try:
        with safe_open(path, framework="numpy") as checked:
            names = list(checked.keys())
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(header_size))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        refuse_pointer(path)
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({_shortfall(path) or error}); "
            "it is truncated or damaged, fetch it again"
        ) from error
    refs = {}
    for name in names:
        entry = header[name]
        refs[name] = TensorRef(
            path=path,
            file_tensor=name,
            dtype=_NAMES.get(entry["dtype"], entry["dtype"]),
            shape=tuple(entry["shape"]),
            offset=8 + header_size + entry["data_offsets"][0],
        )
    return refs


def _shortfall(path: Path) -> str | None:
    """How much of a file has not arrived, if its header can tell."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            if header_size > size:
                return None
            header = json.loads(file.read(header_size))
        end = (
            8
            + header_size
            + max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error):
        return None
    return f"{size} of {end} bytes are here" if isinstance(end, int) and size < end else None


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors (any of the three float types, float64 tables, bytes) as one file, through the
    library. Not atomic.

    Raises OSError, a full disk included.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    path.touch()
    mode = (
        path.stat().st_mode
    )  # what the user's umask gives; the library's files are nobody else's to read
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:  # what the library makes of every error of the system's
        raise OSError(str(error)) from error


def fsync(path: Path) -> None:
    """Make a file's, or a directory's, content reach the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
