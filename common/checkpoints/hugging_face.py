"""Hugging Face directories: config.json beside one model.safetensors, or shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.safetensors_file import TensorRef, refuse_pointer, same_values, write_file
from common.checkpoints.weight_files import (
    INDEX,
    SINGLE,
    find_weights,
    has_weights,
    read_json,
)
from common.errors import CheckpointError
from common.families import Family, ModelConfig, family_of

# What travels with a tenant beside its weights: names that transformers' tokenizers and generate()
# look for.
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


def is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() or has_weights(path)


# What wrappers put before, or into, the name of every tensor, and who they are.
WRAPPERS = {
    "base_model.model.": "PEFT's",
    "module.": "DistributedDataParallel's or DeepSpeed's",
    "_orig_mod.": "torch.compile's",
    "_fsdp_wrapped_module.": "FSDP's",
    "_checkpoint_wrapped_module.": "activation checkpointing's",
}
_ADAPTED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|ia3_l)\b"
)


def open_hugging_face(path: Path) -> Checkpoint:
    """Open a directory and check every tensor's name and shape against config.json.

    Reads headers, and tables of embeddings that config.json says are one where the files hold
    several.
    """
    raw = read_json(path / "config.json")
    where = str(path / "config.json")
    family = family_of(raw, where)
    fields = family.fields(raw, where)
    config = family.parse(fields)
    family.check_fields(fields)
    on_disk, notes = find_weights(path, raw, family.ignored)
    files = _renamed(path, on_disk, family)
    config, untied = _untied(path, family, config, files)
    defaults = ", ".join(f"{field} {value}" for field, value in fields.defaulted.items())
    try:
        regions = family.locate(config, {name: ref.shape for name, ref in files.items()}, str(path))
    except CheckpointError as error:
        if not fields.defaulted:
            raise
        raise CheckpointError(
            f"{error} (not in config.json, transformers' defaults taken: {defaults})"
        ) from error
    tensors = {name: files[region.file_tensor].at(region) for name, region in regions.items()}
    for tensor in tensors.values():
        tensor.check_type()
    notes += [*fields.notes, *untied]
    if fields.defaulted:
        notes.append(f"config.json does not state {defaults}: transformers' defaults")
    left_out = sorted(name for name in files if family.ignored.search(name))
    if left_out:
        notes.append(
            f"{len(left_out)} tensors that the model does not use were left out, first "
            f"{left_out[0]}"
        )
    assets = {name: path / name for name in ASSETS if (path / name).is_file()}
    for file in assets.values():
        refuse_pointer(file)
    if "generation_config.json" in assets:
        read_json(assets["generation_config.json"])  # engines read it: refuse a broken one here
    return Checkpoint(path, family, config, tensors, assets, tuple(notes))


def _renamed(path: Path, files: Mapping[str, TensorRef], family: Family) -> dict[str, TensorRef]:
    """Tensors by the names that they have in a whole model. Raises CheckpointError for names of
    wrapped models."""
    adapted = next((name for name in files if _ADAPTED.search(name)), None)
    if adapted is not None:
        raise CheckpointError(
            f"{path}: tensor {adapted} is an adapter's, which was not merged into the weights; "
            "merge it with PEFT's merge_and_unload and save the model again"
        )
    for part, whose in WRAPPERS.items():
        wrapped = next((name for name in files if f".{part}" in f".{name}"), None)
        if wrapped is not None:
            raise CheckpointError(
                f"{path}: tensor {wrapped} has {whose} prefix {part!r} in its name; "
                "save the model that is wrapped, or take the prefix out of all names"
            )
    found: dict[str, TensorRef] = {}
    for name, ref in files.items():
        plain = family.file_name_of(name)
        if plain in found or (plain != name and plain in files):
            raise CheckpointError(
                f"{path}: holds {plain} twice, with and without a prefix; remove one of them"
            )
        found[plain] = ref
    return found


def _untied(
    path: Path, family: Family, config: ModelConfig, files: Mapping[str, TensorRef]
) -> tuple[ModelConfig, list[str]]:
    """The config with tables untied that differ, and notes. transformers does the same
    (`tie_weights`): a table that a file holds is never replaced by another one's values."""
    there = [name for name in family.tied_tables(config) if name in files]
    for name in there if len(there) > 1 else ():
        files[name].check_type()
    differing = [name for name in there[1:] if not same_values(files[there[0]], files[name])]
    if not differing:
        return config, []
    config = family.parse_config(family.untied(config, differing), str(path / "config.json"))
    return config, [
        f"{name} is served as it is: config.json ties it to {there[0]} (tie_word_embeddings), but "
        "their values differ"
        for name in differing
    ]


def saved_tensors(
    family: Family, config: ModelConfig, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name in files, array) of a model as its family saves it, one at a time.

    read: a tensor by its canonical name; all of one type.
    """
    for file_tensor, parts in family.saved(config).items():
        name, region = parts[0]
        whole = read(name)
        if region.index is not None:
            whole = np.empty(region.whole, dtype=whole.dtype)
            for name, region in parts:
                assert region.rows is not None
                whole[region.index, slice(*region.rows)] = read(name)
        yield file_tensor, whole


def write_hugging_face(
    path: Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 2 << 30,
    on_tensor: Callable[[], None] | None = None,
) -> None:
    """Write config.json and weights into an existing empty directory, in shards of at most
    `max_shard_bytes`.

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
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
