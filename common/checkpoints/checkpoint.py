"""A checkpoint of any format, seen as canonical tensor names that can be read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from common.dtypes import common_dtype
from common.families import Dims, Family, ModelConfig


class TensorSource(Protocol):
    """Where one canonical tensor comes from; nothing is read before `read`.

    path, file_tensor: the file or directory, and the tensor's name in it, for errors.
    dtype: float32, float16 or bfloat16, as on disk. shape: canonical, matrices [out, in].
    """

    @property
    def path(self) -> Path: ...
    @property
    def file_tensor(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Dims: ...
    @property
    def nbytes(self) -> int: ...

    def read(self) -> np.ndarray:
        """A C-contiguous copy in memory. Raises CheckpointError that names file and tensor."""
        ...


def read_asset(asset: Path | bytes) -> bytes:
    """What a file that travels with a tenant holds."""
    return asset if isinstance(asset, bytes) else asset.read_bytes()


@dataclass(frozen=True)
class Checkpoint:
    """Opened, checked against its config, nothing read yet.

    tensors: canonical name (see `common.families`) -> where it lies.
    assets: tokenizer, chat template, configs: files that travel with the tenant, by file name, or
        what they hold.
    notes: for people: what the checkpoint does not state and was taken by default.
    base: of an adapter. Tensors that the adapter leaves alone are the very ones of `base.tensors`.
    """

    path: Path
    family: Family
    config: ModelConfig
    tensors: Mapping[str, TensorSource]
    assets: Mapping[str, Path | bytes]
    notes: tuple[str, ...] = ()
    base: Checkpoint | None = None

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, array) one by one; memory for one tensor at a time."""
        for name, ref in self.tensors.items():
            yield name, ref.read()

    @property
    def dtype(self) -> str:
        """The type that holds every value of every tensor: their own if they agree."""
        return common_dtype([ref.dtype for ref in self.tensors.values()])
