"""Files of many tensors, each called by the hash of what it holds.

A shard is a safetensors file named by the hash of its header. So its name says which tensors it
has, and their names what they hold.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoints.safetensors_file import fsync, read_header, write_file
from common.dtypes import BY_NAME
from common.errors import CheckpointError, StoreError
from common.families import Dims

SINGLE = "tensor"
"""The name in its file of a tensor that has one for itself, as in stores of versions 1 to 3."""

SINGLE_OFFSET = -1
"""Of a tensor whose place in its file only the file's header says."""


class Entry(NamedTuple):
    """Where an object lies. shard: its file, below a store's `objects/`, or an absolute path of a
    checkpoint. offset: in bytes."""

    dtype: str
    shape: Dims
    shard: str
    offset: int

    @property
    def nbytes(self) -> int:
        itemsize = 1 if self.dtype == "uint8" else BY_NAME[self.dtype].itemsize
        return int(np.prod(self.shape, dtype=np.int64)) * itemsize

    @property
    def in_store(self) -> bool:
        return not self.shard.startswith("/")


def write_shard(root: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """Write arrays, by id, as one file. Raises StoreError."""
    partial = root / f"{uuid.uuid4().hex}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_file(partial, arrays)
        fsync(partial)
        name = f"{_header_hash(partial)}.safetensors"
        os.replace(partial, root / name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"{root}: cannot be written: {error}; free some space or choose another place"
        ) from error
    refs = read_header(root / name)
    return {i: Entry(ref.dtype, ref.shape, name, ref.offset) for i, ref in refs.items()}


def single_offset(root: Path, entry: Entry) -> int:
    """Where the only tensor of a file begins. Raises StoreError for other content."""
    path = root / entry.shard
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise StoreError(
            f"{error}; build the store again or restore this file from a backup"
        ) from error
    ref = header.get(SINGLE)
    if ref is None or len(header) != 1 or (ref.dtype, ref.shape) != (entry.dtype, entry.shape):
        raise StoreError(
            f"{path}: holds other tensors than the store's manifest says; build the store again"
        )
    return ref.offset


def shard_damage(root: Path, shard: str) -> str | None:
    """What is wrong with a file as a whole, its tensors' content left out, or None."""
    try:
        read_header(root / shard)
    except CheckpointError as error:
        return str(error)
    several = "/" not in shard
    if several and _header_hash(root / shard) != Path(shard).stem:
        return "its header does not match its name"
    return None


def is_mostly_unused(root: Path, shard: str, used: int) -> bool:
    """Whether less than half of a shard's tensor bytes are the `used` ones."""
    path = root / shard
    if shard.startswith("/") or not path.is_file() or 2 * used >= path.stat().st_size:
        return False
    # A small shard is mostly header.
    return 2 * used < sum(ref.nbytes for ref in read_header(path).values())


def _header_hash(path: Path) -> str:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return hashlib.sha256(file.read(size)).hexdigest()[:32]
