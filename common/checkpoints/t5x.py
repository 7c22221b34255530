"""T5X checkpoint directories, as t5x's own Checkpointer writes them (format version 3).

`checkpoint` is msgpack: {version, optimizer: {target: tree of parameters, state: {step,
param_states}}}. A leaf of the tree is a TensorStore spec of a zarr v2 array in a directory beside
the file (tree path joined by dots), or the array itself as flax packs it (ExtType 1 an array, 3 a
numpy scalar: shape, dtype name, bytes in C order).
Source: google-research/t5x, t5x/checkpoints.py; google/flax, flax/serialization.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.hugging_face import ASSETS
from common.checkpoints.safetensors_file import refuse_pointer
from common.checkpoints.t5x_config import FAMILY, config_for
from common.checkpoints.t5x_names import locate, stream_arrays
from common.checkpoints.tensorstore_array import (
    ArrayOnDisk,
    InlineArray,
    even_chunks,
    open_array,
    require,
    write_array,
)
from common.checkpoints.weight_files import read_json
from common.dtypes import BY_NAME
from common.errors import CheckpointError

INDEX = "checkpoint"
VERSION = 3
# Version 2 differs in one thing: bfloat16 arrays lie as uint16 (t5x/checkpoints.py, comment at
# VERSION).
READABLE_VERSIONS = (2, VERSION)
CHUNK_BYTES = 64 << 20
# T5's vocabulary by transformers' name, and all that a tokenizer can be made of.
VOCABULARY = "spiece.model"
TOKENIZERS = (VOCABULARY, "tokenizer.json", "tokenizer.model")
PLACEHOLDER = ("PLACEHOLDER://", "AGGREGATED://")

_ARRAY, _SCALAR = 1, 3


def read_msgpack(path: Path) -> dict[str, Any]:
    """The tree in a `checkpoint` file; inline arrays become numpy arrays, of floats or not.

    Raises CheckpointError if the file is missing, damaged or no such tree. Runs no code from it.
    """
    msgpack = require("msgpack")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    refuse_pointer(path)
    if data.startswith(b"model_checkpoint_path"):
        raise CheckpointError(
            f"{path}: belongs to a TensorFlow checkpoint; convert it with T5X's "
            "convert_tf_checkpoint.py first"
        )
    try:
        tree = msgpack.unpackb(data, ext_hook=_unpack_array, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise CheckpointError(
            f"{path}: no msgpack index as T5X and Orbax write it ({error}); it is truncated or "
            "damaged, copy it again"
        ) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: holds {type(tree).__name__}, expected a tree of parameters")
    return tree


def _unpack_array(code: int, data: bytes) -> Any:
    """flax's ExtTypes; other numbers of a state (complex ones) are kept as they are, unread."""
    msgpack = require("msgpack")
    if code not in (_ARRAY, _SCALAR):
        return msgpack.ExtType(code, data)
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an inline array has shape {shape}")
    found = BY_NAME[dtype] if dtype in BY_NAME else np.dtype(dtype)
    if found.hasobject or len(content) != math.prod(shape) * found.itemsize:
        raise ValueError(
            f"an inline array of shape {list(shape)} and type {dtype} has {len(content)} bytes"
        )
    return np.frombuffer(content, dtype=found).reshape(shape)


def is_t5x_index(tree: Mapping[str, Any]) -> bool:
    """Whether a `checkpoint` file's tree is t5x's own; an older Orbax's has neither of these
    fields."""
    return "version" in tree or "optimizer" in tree


def open_t5x(
    path: Path, index: Mapping[str, Any], config: Path | None, asset_folders: tuple[Path, ...]
) -> Checkpoint:
    """Open a T5X checkpoint directory whose `checkpoint` file holds `index`.

    config: a config.json that states what the arrays do not. asset_folders: where tokenizer files
        may lie.
    Raises CheckpointError.
    """
    file = path / INDEX
    version = index.get("version")
    if version not in READABLE_VERSIONS or isinstance(version, bool):
        raise CheckpointError(
            f"{file}: has format version {version!r}; this version of Moetel reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}"
        )
    optimizer = index.get("optimizer")
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict) or not target:
        found = (
            sorted(map(str, optimizer)) if isinstance(optimizer, dict) else type(optimizer).__name__
        )
        raise CheckpointError(
            f"{file}: holds no parameters: 'optimizer' has {found}, no 'target'; "
            "this is optimizer state alone, give a checkpoint with parameters"
        )
    arrays = {name: _leaf(path, name, leaf, version) for name, leaf in _leaves(target, file)}
    return assemble(path, arrays, config, asset_folders)


def assemble(
    path: Path,
    arrays: Mapping[str, ArrayOnDisk],
    config: Path | None,
    asset_folders: tuple[Path, ...],
) -> Checkpoint:
    """A checkpoint from the arrays of a T5X tree, by their names in it. Raises CheckpointError."""
    given = read_json(config) if config is not None else None
    raw, decided = config_for(
        {name: a.shape for name, a in arrays.items()}, str(path), given, str(config)
    )
    where = str(config) if config is not None else f"{path} (config made from its arrays)"
    fields = FAMILY.fields(raw, where)
    parsed = FAMILY.parse(fields)
    FAMILY.check_fields(fields)
    tensors = locate(FAMILY.all_shapes(parsed), parsed.experts.num_experts, arrays)
    assets: dict[str, Path | bytes] = {
        name: folder / name
        for folder in reversed(asset_folders)
        for name in ASSETS
        if (folder / name).is_file()
    }
    notes = [*decided, *fields.notes, *_vocabulary(asset_folders, assets)]
    # Whole, as it was decided: transformers tells by it which tokenizer a vocabulary belongs to.
    assets["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
    return Checkpoint(path, FAMILY, parsed, tensors, assets, tuple(notes))


def _vocabulary(folders: tuple[Path, ...], assets: dict[str, Path | bytes]) -> list[str]:
    """Take the one vocabulary along that lies here under T5X's own name, such as
    sentencepiece.model. Returns notes."""
    if any(name in assets for name in TOKENIZERS):
        return []
    found = {p.name: p for folder in reversed(folders) for p in sorted(folder.glob("*.model"))}
    if len(found) > 1:
        return [
            f"no vocabulary taken, there are several ({', '.join(found)}); call the right one "
            f"{VOCABULARY}"
        ]
    for name, file in found.items():
        assets[VOCABULARY] = file
        return [f"{name} is taken as the vocabulary ({VOCABULARY})"]
    return []


def _leaves(tree: Mapping[str, Any], file: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name in the tree, spec or array) of every leaf; `kernel` may be a map, a spec is one too."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not {"driver", "kvstore"} <= value.keys():
            yield from _leaves(value, file, f"{name}.")
        elif value is not None:
            yield name, value


def _leaf(path: Path, name: str, leaf: Any, version: int) -> ArrayOnDisk:
    full = f"target.{name}"
    if isinstance(leaf, np.ndarray):
        return inline(path / INDEX, full, leaf)
    if not isinstance(leaf, dict):
        raise CheckpointError(
            f"{path / INDEX}: {full} is {type(leaf).__name__}, expected an array or a TensorStore "
            "spec"
        )
    kvstore = leaf["kvstore"]
    # tensorstore before 0.1.14 put the path beside the kvstore. Its driver and bucket say where the
    # checkpoint was written; it is read from here.
    relative = kvstore.get("path", leaf.get("path")) if isinstance(kvstore, dict) else None
    if leaf["driver"] != "zarr" or not isinstance(relative, str):
        raise CheckpointError(
            f"{path / INDEX}: {full} has driver {leaf['driver']!r} and path {relative!r}; expected "
            "a zarr array"
        )
    if not relative.strip("/") or relative.startswith("/") or ".." in Path(relative).parts:
        raise CheckpointError(
            f"{path / INDEX}: {full} points to {relative!r}, which is outside the checkpoint"
        )
    folder = path / relative
    if not (folder / ".zarray").is_file():
        raise CheckpointError(
            f"{folder}: array {full} is named in {path / INDEX} but missing; "
            "the checkpoint is incomplete, copy it again"
        )
    kvstore = {"driver": "file", "path": f"{folder}/"}
    array = open_array({"driver": "zarr", "kvstore": kvstore}, folder, full, bits=version < VERSION)
    metadata = leaf.get("metadata")
    stated = metadata.get("shape") if isinstance(metadata, dict) else None
    if stated is not None and tuple(stated) != array.shape:
        raise CheckpointError(
            f"{folder}: array {full} is {list(array.shape)}, {path / INDEX} says {list(stated)}; "
            "files of two checkpoints are mixed here, copy one again"
        )
    return array


def inline(file: Path, name: str, data: np.ndarray) -> InlineArray:
    """An array of the index file itself. Raises CheckpointError if it holds no floats."""
    if data.dtype.name not in BY_NAME:
        raise CheckpointError(
            f"{file}: array {name} has type {data.dtype.name}; weights must be float32, bfloat16 "
            "or float16"
        )
    return InlineArray(file, name, data)


def write_t5x(
    path: Path,
    checkpoint: Checkpoint,
    *,
    step: int = 0,
    dtype: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
    on_tensor: Callable[[], None] | None = None,
) -> None:
    """Write parameters and step as t5x's Checkpointer does, into an existing empty directory. Not
    atomic.

    dtype: "auto" (each array's own), "float32" or "bfloat16". One array is in memory at a time.
    Raises CheckpointError for a model that T5X has no layout for, OSError if it cannot be written.
    """
    msgpack = require("msgpack")
    target: dict[str, Any] = {}
    for name, count, array in stream_arrays(checkpoint, dtype):
        metadata = {
            # t5x counts in the type of training, float32, also where it saves in bfloat16.
            "chunks": even_chunks(array.shape, chunk_bytes // 4),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        }
        place = f"target.{name}/"
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{path.resolve()}/{place}"},
        }
        write_array(spec | {"metadata": metadata}, path / place, array)
        set_leaf(
            target,
            name,
            {
                "driver": "zarr",
                "dtype": array.dtype.name,
                "kvstore": {"driver": "file", "path": place},
                "metadata": metadata,
            },
        )
        for _ in range(count if on_tensor else 0):
            assert on_tensor is not None
            on_tensor()
    scalar = np.int32(step)
    packed = msgpack.packb(([], scalar.dtype.name, scalar.tobytes()), use_bin_type=True)
    index = {
        "version": VERSION,
        "optimizer": {"state": {"step": msgpack.ExtType(_SCALAR, packed)}, "target": target},
    }
    (path / INDEX).write_bytes(msgpack.packb(index, use_bin_type=True))


def set_leaf(tree: dict[str, Any], name: str, value: Any) -> None:
    """Put a value at a dotted name into nested maps."""
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
