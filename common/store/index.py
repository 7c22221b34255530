"""The index of a store's objects: where each lies, and which ones tenants and the plan name.

A large store has tens of thousands of objects, so they are rows of arrays and not of JSON.

Legend: objects N, the most dimensions of an object D, projections P.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.checkpoints.safetensors_file import fsync
from common.errors import StoreError
from common.store.shards import Entry

PREFIX = "index-"
ABSENT = -1
"""In place of an object's row, where a packed store does not hold the object."""


@dataclass(frozen=True)
class Index:
    """entries: every object. named: lists of ids by a name of their own, None where one is absent.

    On disk (safetensors): `ids` uint8 [N, 32]; `shard` int32 [N], a row of the manifest's `shards`;
    `dtype` int32 [N], one of its `dtypes`; `offset` int64 [N]; `shape` int64 [N, D], filled up with
    -1; every list of `named` int32, rows of objects or -1.
    """

    entries: Mapping[str, Entry]
    named: Mapping[str, Sequence[str | None]]

    def write(self, directory: Path) -> dict[str, Any]:
        """Write it beside the manifest, and return what the manifest says of it."""
        ids = sorted(self.entries)
        row = {object_id: i for i, object_id in enumerate(ids)}
        each = [self.entries[i] for i in ids]
        shards = sorted({e.shard for e in each})
        dtypes = sorted({e.dtype for e in each})
        shard_row = {name: i for i, name in enumerate(shards)}
        dtype_row = {name: i for i, name in enumerate(dtypes)}
        most = max((len(e.shape) for e in each), default=1)
        shape = np.full((len(each), most), -1, dtype=np.int64)
        for i, entry in enumerate(each):
            shape[i, : len(entry.shape)] = entry.shape
        arrays = {
            "ids": np.frombuffer(bytes.fromhex("".join(ids)), dtype=np.uint8).reshape(-1, 32),
            "shard": np.array([shard_row[e.shard] for e in each], dtype=np.int32),
            "dtype": np.array([dtype_row[e.dtype] for e in each], dtype=np.int32),
            "offset": np.array([e.offset for e in each], dtype=np.int64),
            "shape": shape,
        }
        for name, wanted in self.named.items():
            rows = [ABSENT if i is None else row[i] for i in wanted]
            arrays[name] = np.array(rows, dtype=np.int32)
        data = save(arrays)
        checksum = hashlib.sha256(data).hexdigest()
        path = directory / f"{PREFIX}{checksum[:24]}.safetensors"
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        fsync(partial)
        os.replace(partial, path)
        return {"file": path.name, "sha256": checksum, "shards": shards, "dtypes": dtypes}

    @classmethod
    def read(cls, directory: Path, about: Mapping[str, Any]) -> Index:
        """about: what `write` returned. Raises StoreError for a missing or damaged file."""
        path = directory / about["file"]
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != about["sha256"]:
                raise StoreError(
                    f"{path}: damaged, its checksum does not match; build the store again"
                )
            arrays = load(data)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: cannot be read: {error}; build the store again") from error
        text = arrays.pop("ids").tobytes().hex()
        ids = [text[i : i + 64] for i in range(0, len(text), 64)]
        columns = [arrays.pop(name).tolist() for name in ("dtype", "shape", "shard", "offset")]
        dtypes, shards = about["dtypes"], about["shards"]
        entries = {
            object_id: Entry(dtypes[dtype], tuple(n for n in shape if n >= 0), shards[shard], place)
            for object_id, dtype, shape, shard, place in zip(ids, *columns, strict=True)
        }
        named = {
            name: [None if i == ABSENT else ids[i] for i in rows.tolist()]
            for name, rows in arrays.items()
        }
        return cls(entries, named)
