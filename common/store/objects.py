"""The content-addressed part of a store: one immutable safetensors file a tensor, named by the hash
of what it holds.

Equal tensors have equal names, so each is on disk once whoever owns it. A file appears under its
name only when whole.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.checkpoint import read_asset
from common.checkpoints.safetensors_file import TensorRef, fsync, read_header, write_file
from common.dtypes import BY_NAME
from common.errors import CheckpointError, StoreError
from common.families import Dims

TENSOR = "tensor"  # the one tensor's name inside each file


def content_id(array: np.ndarray) -> str:
    """Hex SHA-256 over type, shape and the bytes in C order."""
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Objects:
    """The `objects/` directory of one store."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, object_id: str) -> Path:
        return self.root / object_id[:2] / f"{object_id}.safetensors"

    def put(self, array: np.ndarray) -> str:
        """Store an array unless it is there; returns its id. An existing file is checked, and
        replaced if damaged."""
        object_id = content_id(array)
        path = self.path(object_id)
        if path.exists() and self.damage(object_id, array.dtype.name, array.shape) is None:
            return object_id
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f"{uuid.uuid4().hex}.partial"
        try:
            write_file(partial, {TENSOR: array})
            fsync(partial)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreError(
                f"{path}: cannot be written: {error}; free some space or choose another place"
            ) from error
        return object_id

    def ref(self, object_id: str, dtype: str, shape: Dims) -> TensorRef:
        """Where an object lies. Checks name, type, shape and size from the header, not the content
        (see `damage`)."""
        path = self.path(object_id)
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise StoreError(
                f"{error}; build the store again or restore this file from a backup"
            ) from error
        ref = header.get(TENSOR)
        if ref is None or len(header) != 1 or (ref.dtype, ref.shape) != (dtype, tuple(shape)):
            raise StoreError(
                f"{path}: holds other tensors than the store's manifest says; build the store again"
            )
        return ref

    def read(self, ref: TensorRef) -> np.ndarray:
        """What `ref` of this store says, compared with the checksum that names its file. Raises
        StoreError.

        For whatever is measured or made from it: damage would become what the store says is right.
        """
        array = ref.read()
        self.check(ref, array)
        return array

    def check(self, ref: TensorRef, array: np.ndarray) -> None:
        """Compare what was read or mapped at `ref` with its file's checksum. Raises StoreError that
        names the file."""
        if content_id(array) != ref.path.stem:
            raise StoreError(
                f"{ref.path}: content does not match its checksum; `moetel verify "
                f"{self.root.parent}` lists all "
                "damaged files; restore them from a backup or build the store again"
            )

    def damage(self, object_id: str, dtype: str, shape: Dims) -> str | None:
        """Read the whole object and say what is wrong with it, or None."""
        try:
            ref = self.ref(object_id, dtype, shape)
            if content_id(ref.read()) != object_id:
                return "content does not match its checksum"
        except (StoreError, CheckpointError) as error:
            return str(error)
        return None

    def sweep(self, keep: set[str]) -> None:
        """Remove every file that no id in `keep` names, leftovers of killed builds included."""
        for path in list(self.root.glob("*/*")):
            if path.suffix != ".safetensors" or path.stem not in keep:
                path.unlink(missing_ok=True)
        for folder in list(self.root.glob("*")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def unreferenced(self, keep: set[str]) -> list[Path]:
        return sorted(
            p for p in self.root.glob("*/*") if p.suffix != ".safetensors" or p.stem not in keep
        )


def save_assets(
    root: Path, assets: Mapping[str, Path | bytes]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Copy a tenant's small files into a folder named by their content.

    Returns the folder's name, and file -> sha256 and bytes.
    """
    contents = {name: read_asset(asset) for name, asset in sorted(assets.items())}
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in contents.items()
    }
    folder = hashlib.sha256(
        repr([(n, f["sha256"]) for n, f in files.items()]).encode()
    ).hexdigest()[:24]
    target = root / folder
    target.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        if (target / name).exists() and (target / name).read_bytes() == data:
            continue
        partial = target / f"{uuid.uuid4().hex}.partial"
        partial.write_bytes(data)
        fsync(partial)
        os.replace(partial, target / name)
    return folder, files


def asset_damage(path: Path, sha256: str) -> str | None:
    """What is wrong with a tenant's small file, or None."""
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return "content does not match its checksum"
    except OSError as error:
        return f"cannot be read: {error}"
    return None


def check_dtype(name: str) -> None:
    if name not in BY_NAME:
        raise StoreError(f"dtype {name!r} is not one of auto, {', '.join(BY_NAME)}")
