"""Lazy readers and writers of checkpoints. A reader gives canonical names; each tensor is read or
mapped on its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from common.checkpoints.checkpoint import Checkpoint, TensorSource, read_asset
from common.checkpoints.hugging_face import (
    is_hugging_face,
    open_hugging_face,
    saved_tensors,
    write_hugging_face,
)
from common.checkpoints.orbax import METADATA, is_orbax, open_orbax, write_orbax
from common.checkpoints.peft import base_of, is_adapter, open_adapter
from common.checkpoints.safetensors_file import TensorRef
from common.checkpoints.t5x import INDEX, is_t5x_index, open_t5x, read_msgpack, write_t5x
from common.checkpoints.weight_files import has_weights, places
from common.errors import CheckpointError

EXPECTED = (
    "a Hugging Face directory (config.json with safetensors), a PEFT adapter "
    "(adapter_config.json), a T5X checkpoint (a file 'checkpoint' beside its arrays) "
    f"or an Orbax one ({METADATA} beside its arrays)"
)

# checkpoint_<step> of T5X, <step> of Orbax's CheckpointManager.
_STEP = re.compile(r"(?:checkpoint_)?(\d+)")
_UNFINISHED = re.compile(r"\.tmp-\d+$|\.orbax-checkpoint-tmp")


def open_checkpoint(
    path: str | Path,
    config: str | Path | None = None,
    *,
    base: str | Path | None = None,
    beside: Mapping[Path, Checkpoint] | None = None,
) -> Checkpoint:
    """Open a checkpoint directory of any supported format, told apart by content.

    path: may also be a run's directory that holds one `checkpoint_<step>` (T5X) or `<step>`
        (Orbax), or one item.
    config: for T5X and Orbax, which store none: a config.json, or a directory that holds one
    (tokenizer files there come along). Without it a config.json in the checkpoint's directory is
    used; else what the arrays do not tell is taken from T5's defaults, and `notes` of the result
    say so.
    base: for adapters: the checkpoint that it is for. Without it the one that its
        adapter_config.json names is looked for; see `common.checkpoints.peft`.
    beside: checkpoints that are open, by their resolved paths; an adapter's base may be one.

    Raises CheckpointError that names the directory, file or tensor at fault.
    """
    path, beside = Path(path), beside or {}
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; give the directory that holds it: {EXPECTED}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a checkpoint directory: {EXPECTED}")
    if is_adapter(path):
        if config is not None:
            raise CheckpointError(
                f"{path}: an adapter, which has its base's config.json; leave the config out"
            )

        def open_base(place: Path) -> Checkpoint:
            if is_adapter(place):
                raise CheckpointError(
                    f"{place}: is an adapter itself, and cannot be the base of {path}; merge it "
                    "into its base first"
                )
            known = beside.get(place.resolve())
            return open_checkpoint(place) if known is None else known

        return open_adapter(path, None if base is None else Path(base), tuple(beside), open_base)
    if base is not None:
        raise CheckpointError(
            f"{path}: a whole model, no adapter; a base ({base}) is given for adapters alone"
        )
    if has_weights(path):
        if config is not None:
            raise CheckpointError(
                f"{path}: a Hugging Face directory, which has its own config.json; a config is "
                "taken for T5X and Orbax "
                "checkpoints alone"
            )
        return open_hugging_face(path)
    found = find_arrays(path)
    if found is None:
        if is_hugging_face(path):
            return open_hugging_face(path)  # says what is missing
        inside = places(path)
        if inside:
            raise CheckpointError(
                f"{path}: no checkpoint here, but in directories below; give one of them: "
                f"{', '.join(inside)}"
            )
        what = "is empty" if not any(path.iterdir()) else "no checkpoint recognised here"
        raise CheckpointError(f"{path}: {what}; expected {EXPECTED}")
    folders = (found,) if found == path else (found, path)
    config_file = _config_file(config, folders)
    if config is not None and Path(config).is_dir():
        folders = (*folders, Path(config))
    if not is_orbax(found):
        index = read_msgpack(found / INDEX)
        if is_t5x_index(index):
            return open_t5x(found, index, config_file, folders)
    return open_orbax(found, config_file, folders)


def find_arrays(path: Path) -> Path | None:
    """The T5X or Orbax checkpoint at `path`: itself, its one item, or the one step of a run. None
    if there is none.

    Raises CheckpointError if there are several, or if its writing was not finished.
    """
    if is_orbax(path) or (path / INDEX).is_file():
        if _UNFINISHED.search(path.resolve().name):
            raise CheckpointError(
                f"{path}: the writing of this checkpoint was not finished; give a finished one"
            )
        return path
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and not _UNFINISHED.search(p.name)]
    items = [p for p in folders if is_orbax(p) or (p / INDEX).is_file()]
    steps = sorted((int(m[1]), p) for p in folders if (m := _STEP.fullmatch(p.name)))
    if steps:
        items = [found for _, p in steps if (found := find_arrays(p)) is not None]
    if len(items) > 1:
        names = ", ".join(str(p.relative_to(path)) for p in items[:10]) + (
            ", ..." if len(items) > 10 else ""
        )
        raise CheckpointError(f"{path}: holds {len(items)} checkpoints; give one of them: {names}")
    return items[0] if items else None


def _config_file(config: str | Path | None, folders: tuple[Path, ...]) -> Path | None:
    if config is not None:
        file = Path(config)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file; give a config.json or a directory that holds one"
            )
        return file
    return next((f / "config.json" for f in folders if (f / "config.json").is_file()), None)


__all__ = [
    "Checkpoint",
    "TensorRef",
    "TensorSource",
    "base_of",
    "find_arrays",
    "is_adapter",
    "open_checkpoint",
    "read_asset",
    "saved_tensors",
    "write_hugging_face",
    "write_orbax",
    "write_t5x",
]
