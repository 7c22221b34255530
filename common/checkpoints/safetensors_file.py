"""One safetensors file, read by tensor without loading the rest.

The header is checked by the `safetensors` library (sizes, overlaps, truncation); the offsets that it does not hand
out are read from the header itself (format: huggingface/safetensors README, "Format": 8 bytes little-endian header
size, JSON, data), so that a tensor can be mapped in place, bfloat16 included.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.checkpoints.mapping import map_bytes
from common.dtypes import BY_NAME
from common.errors import CheckpointError
from common.families import Region, Shape


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor's bytes lie: `nbytes` at `offset` of `path`, C order, little endian."""

    path: Path
    file_tensor: str
    dtype: str
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * _TYPES[self.dtype].itemsize

    def map(self) -> np.ndarray:
        """A read-only view of the file; pages are read when touched. The mapping lives as long as the array."""
        try:
            return map_bytes(self.path, self.offset, self.nbytes).view(_TYPES[self.dtype]).reshape(self.shape)
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {self.file_tensor} cannot be mapped: {error}") from error

    def read(self) -> np.ndarray:
        """A copy in memory of our own, so that no page of the file stays counted to this process."""
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
                            f"{self.path}: tensor {self.file_tensor} ends after {done} of {len(view)} bytes; "
                            "the file changed or is truncated, fetch it again"
                        )
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}: tensor {self.file_tensor} cannot be read: {error}") from error
        return out

    def at(self, region: Region) -> TensorRef:
        """The part of this tensor that a region names."""
        if region.index is None or region.rows is None:
            return self
        _, rows, columns = self.shape
        itemsize = _TYPES[self.dtype].itemsize
        start = (region.index * rows + region.rows[0]) * columns * itemsize
        return replace(self, shape=region.shape, offset=self.offset + start)


# Weights are floats; a store's own files also hold bytes.
_TYPES: dict[str, np.dtype[Any]] = {**BY_NAME, "uint8": np.dtype(np.uint8)}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by the codes of the header


def read_header(path: Path, *, with_bytes: bool = False) -> dict[str, TensorRef]:
    """The tensors of one file. with_bytes: U8 is allowed beside floats.

    Raises CheckpointError if it is missing, damaged, or holds other types.
    """
    names_of_types = _NAMES | ({"U8": "uint8"} if with_bytes else {})
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again")
    try:
        with safe_open(path, framework="numpy") as checked:
            names = list(checked.keys())
        with open(path, "rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(header_size))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it is truncated or damaged, fetch it again"
        ) from error
    refs = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in names_of_types:
            raise CheckpointError(
                f"{path}: tensor {name} has type {entry['dtype']}; weights must be F32, F16 or BF16 "
                "(quantised checkpoints are not supported, give the original)"
            )
        refs[name] = TensorRef(
            path=path,
            file_tensor=name,
            dtype=names_of_types[entry["dtype"]],
            shape=tuple(entry["shape"]),
            offset=8 + header_size + entry["data_offsets"][0],
        )
    return refs


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors (any of the three float types, float64 tables, bytes) as one file, through the library. Not atomic.

    Raises OSError, a full disk included.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; the library's files are nobody else's to read
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
