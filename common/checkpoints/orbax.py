"""Orbax PyTree checkpoints with T5X's parameter tree inside, through TensorStore alone: importing
orbax imports jax.

A directory holds `_METADATA` (JSON: every leaf's path, and whether zarr3 and OCDBT are used) and
the arrays, each
under its tree path joined by dots: a directory of its own, or a key of one OCDBT database
(`manifest.ocdbt`, `d/`). Before 0.5 the tree stood in a msgpack file `checkpoint`, whose leaves are
"PLACEHOLDER://<name>" or small arrays; T5X's Orbax backend left that, in
`checkpoint_<step>/state/`.
Source: google/orbax, orbax/checkpoint/_src/metadata/tree.py and
_src/serialization/tensorstore_utils.py (0.12.8); google-research/t5x, t5x/checkpoints.py,
OrbaxCheckpointManagerInterface.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.t5x import INDEX, PLACEHOLDER, assemble, inline, read_msgpack
from common.checkpoints.t5x_names import EMBEDDING, stream_arrays
from common.checkpoints.tensorstore_array import (
    ArrayOnDisk,
    even_chunks,
    open_array,
    require,
    write_array,
)
from common.checkpoints.weight_files import read_json
from common.errors import CheckpointError

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
CHUNK_BYTES = 64 << 20

# Value types of `_METADATA` that stand for an empty node of the tree.
EMPTY = ("None", "Dict", "List", "NamedTuple")
_DICT_KEY = 2


@dataclass(frozen=True)
class _Format:
    """How the arrays of a directory lie. `elided`: chunks equal to the fill value may be absent."""

    ocdbt: bool
    zarr3: bool
    elided: bool


def is_orbax(path: Path) -> bool:
    """Whether a directory is an Orbax item itself; older ones, which have no `_METADATA`, are told
    by their index."""
    return (path / METADATA).is_file() or (path / MANIFEST).is_file()


def open_orbax(path: Path, config: Path | None, asset_folders: tuple[Path, ...]) -> Checkpoint:
    """Open an Orbax item whose tree holds T5X parameters under `target`, under `params`, or at the
    top.

    config: a config.json that states what the arrays do not. asset_folders: where tokenizer files
        may lie.
    Raises CheckpointError.
    """
    if (path / METADATA).is_file():
        leaves, layout = _from_metadata(path)
    elif (path / INDEX).is_file():
        leaves, layout = _from_index(path)
    else:
        raise CheckpointError(
            f"{path}: an Orbax checkpoint without {METADATA}; it is incomplete, copy the whole "
            "directory again"
        )
    ts = require("tensorstore")
    # One cache for the nodes of the OCDBT tree, which every array would read anew otherwise.
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": 100_000_000}})
    arrays: dict[str, ArrayOnDisk] = {}
    for keys, leaf in _parameters(path, leaves).items():
        if isinstance(leaf, np.ndarray):
            arrays[keys] = inline(path / INDEX, keys, leaf)
        else:
            arrays[keys] = open_array(_spec(path, leaf, layout), path / leaf, leaf, context=context)
    return assemble(path, arrays, config, asset_folders)


def _from_metadata(path: Path) -> tuple[dict[tuple[str, ...], Any], _Format]:
    """Path in the tree -> name of its array (or the array, where it stands in the old index), and
    the layout."""
    file = path / METADATA
    metadata = read_json(file)
    entries = metadata.get("tree_metadata")
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file}: field 'tree_metadata' is missing; the file is damaged, copy it again"
        )
    aggregated: dict[tuple[str, ...], Any] = {}
    if (path / INDEX).is_file():
        aggregated = {
            k: v
            for k, v in _flatten(read_msgpack(path / INDEX)).items()
            if isinstance(v, np.ndarray)
        }
    leaves: dict[tuple[str, ...], Any] = {}
    for where, entry in entries.items():
        try:
            keys = tuple(str(k["key"]) for k in entry["key_metadata"])
            kind = entry["value_metadata"]["value_type"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: entry {where} lacks its key or value metadata; the file is damaged, copy "
                "it again"
            ) from error
        if kind not in EMPTY:
            leaves[keys] = aggregated.get(keys, ".".join(keys))
    zarr3 = metadata.get("use_zarr3") is True
    ocdbt = metadata.get("use_ocdbt")
    return leaves, _Format(
        ocdbt=(path / MANIFEST).is_file() if ocdbt is None else ocdbt is True,
        zarr3=zarr3,
        # zarr v2 arrays of Orbax have no fill value, so all their chunks are always written.
        elided=zarr3 and metadata.get("store_array_data_equal_to_fill_value") is not True,
    )


def _from_index(path: Path) -> tuple[dict[tuple[str, ...], Any], _Format]:
    leaves: dict[tuple[str, ...], Any] = {}
    for keys, leaf in _flatten(read_msgpack(path / INDEX)).items():
        if isinstance(leaf, str) and leaf.startswith(PLACEHOLDER):
            leaves[keys] = leaf.split("://", 1)[1]
        elif isinstance(leaf, np.ndarray):
            leaves[keys] = leaf
    return leaves, _Format(ocdbt=(path / MANIFEST).is_file(), zarr3=False, elided=False)


def _flatten(tree: Mapping[Any, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        keys = (*prefix, str(key))
        found |= _flatten(value, keys) if isinstance(value, dict) else {keys: value}
    return found


def _parameters(path: Path, leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The leaves below `target`, `params` or the top, by their dotted names there."""
    tops = sorted({keys[0] for keys in leaves if keys})
    roots = {("target",), ("params", "params"), ("params",), ()}
    embedding = tuple(EMBEDDING.split("."))
    root = next(
        (r for r in sorted(roots, key=len, reverse=True) if (*r, *embedding) in leaves), None
    )
    if root is None:
        root = next(((t,) for t in ("target", "params") if t in tops), None)
    if root is None:
        raise CheckpointError(
            f"{path}: holds no parameters: found {', '.join(tops) or 'nothing'} at the top of the "
            "tree, no 'target' "
            "and no 'params'; give a checkpoint with the parameters of a T5X Switch Transformer"
        )
    return {
        ".".join(keys[len(root) :]): leaf
        for keys, leaf in leaves.items()
        if keys[: len(root)] == root
    }


def _spec(path: Path, name: str, layout: _Format) -> dict[str, Any]:
    if "/" in name or name in ("", ".", ".."):
        raise CheckpointError(
            f"{path}: array name {name!r} is no plain name; the checkpoint's index is damaged"
        )
    base = {"driver": "file", "path": f"{path.resolve()}/"}
    kvstore: dict[str, Any]
    if layout.ocdbt:
        kvstore = {
            "driver": "ocdbt",
            "base": base,
            "path": f"{name}/",
            "cache_pool": "cache_pool#nodes",
        }
    else:
        kvstore = base | {"path": f"{base['path']}{name}/"}
    spec: dict[str, Any] = {"driver": "zarr3" if layout.zarr3 else "zarr", "kvstore": kvstore}
    return spec | ({"fill_missing_data_reads": True} if layout.elided else {})


def write_orbax(
    path: Path,
    checkpoint: Checkpoint,
    *,
    step: int = 0,
    dtype: str = "auto",
    on_tensor: Callable[[], None] | None = None,
) -> None:
    """Write {target: parameters, state: {step}} into an existing empty directory, as Orbax reads
    it. Not atomic.

    Layout: zarr v2 in a directory an array, as T5X's Orbax backend has it (use_ocdbt=False). Arrays
        of experts are cut
    between experts, so that one can be read alone. dtype: "auto" (each array's own), "float32" or
    "bfloat16". One array is in memory at a time. Raises CheckpointError for a model that T5X has no
    layout for, OSError if it cannot be written.
    """
    entries: dict[str, Any] = {}

    def put(name: str, array: np.ndarray) -> None:
        chunks = even_chunks(
            array.shape[1:] if array.ndim == 3 else array.shape, CHUNK_BYTES // array.dtype.itemsize
        )
        metadata = {
            "shape": list(array.shape),
            "chunks": [1, *chunks] if array.ndim == 3 else chunks,
            "compressor": {"id": "zstd", "level": 1},
        }
        kvstore = {"driver": "file", "path": f"{path.resolve()}/{name}/"}
        write_array(
            {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, path / name, array
        )
        keys = tuple(name.split("."))
        # As numpy arrays, which restore anywhere: for jax arrays Orbax would ask which devices they
        # were on.
        entries[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }

    put("state.step", np.array(step, dtype=np.int32))
    for name, count, array in stream_arrays(checkpoint, dtype):
        put(f"target.{name}", array)
        for _ in range(count if on_tensor else 0):
            assert on_tensor is not None
            on_tensor()
    metadata = {
        "tree_metadata": dict(sorted(entries.items())),
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (path / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
