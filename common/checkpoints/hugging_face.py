"""Hugging Face directories: config.json beside one model.safetensors, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.safetensors_file import TensorRef, read_header, write_file
from common.errors import CheckpointError
from common.families import family_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What travels with a tenant beside its weights: names that transformers' tokenizers and generate() look for.
ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: the file is missing; a checkpoint directory holds it beside the weights"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / SINGLE).is_file() or (path / INDEX).is_file()


def _shards(path: Path) -> dict[str, TensorRef]:
    """Every tensor of the directory's files, by its name on disk."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX}: field 'weight_map' is missing or empty; fetch the file again")
        headers: dict[str, dict[str, TensorRef]] = {}
        refs = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{path / INDEX}: tensor {name} points to {shard!r}, which is no file name")
            if shard not in headers:
                if not (path / shard).is_file():
                    raise CheckpointError(f"{path / shard}: shard named in {INDEX} is missing; fetch it again")
                headers[shard] = read_header(path / shard)
            if name not in headers[shard]:
                raise CheckpointError(
                    f"{path / shard}: tensor {name} is missing, {INDEX} says it is here; fetch the shard again"
                )
            refs[name] = headers[shard][name]
        return refs
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    pickles = sorted(p.name for p in path.glob("*.bin"))
    hint = (
        f"; {pickles[0]} is a pickle, which can run code and is never read: convert it to safetensors first"
        if pickles
        else "; expected model.safetensors, or shards with model.safetensors.index.json"
    )
    raise CheckpointError(f"{path}: no safetensors weights here{hint}")


def open_hugging_face(path: Path) -> Checkpoint:
    """Open a directory and check every tensor's name and shape against config.json. Reads headers alone."""
    raw = read_json(path / "config.json")
    where = str(path / "config.json")
    family = family_of(raw, where)
    config = family.parse_config(raw, where)
    files = _shards(path)
    regions = family.locate(config, {name: ref.shape for name, ref in files.items()}, str(path))
    tensors = {name: files[region.file_tensor].at(region) for name, region in regions.items()}
    assets = {name: path / name for name in ASSETS if (path / name).is_file()}
    if "generation_config.json" in assets:
        read_json(assets["generation_config.json"])  # engines read it: refuse a broken one here
    return Checkpoint(path, family, config, tensors, assets)


def write_hugging_face(
    path: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 2 << 30,
    on_tensor: Callable[[], None] | None = None,
) -> None:
    """Write config.json and weights into an existing empty directory, in shards of at most `max_shard_bytes`.

    Memory: what the arrays of one shard hold; pass memory-mapped arrays to hold next to nothing.
    """
    shards: list[dict[str, tuple[int, ...]]] = []
    pending: dict[str, np.ndarray] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        write_file(path / f"shard-{len(shards)}.tmp", pending)
        shards.append({name: array.shape for name, array in pending.items()})
        pending, pending_bytes = {}, 0

    for name, array in tensors:
        if pending and pending_bytes + array.nbytes > max_shard_bytes:
            flush()
        pending[name] = array
        pending_bytes += array.nbytes
        total_bytes += array.nbytes
        if on_tensor:
            on_tensor()
    flush()
    if len(shards) == 1:
        (path / "shard-0.tmp").rename(path / SINGLE)
    else:
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            (path / f"shard-{i}.tmp").rename(path / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
