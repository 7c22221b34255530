"""Which files of a Hugging Face directory are its weights, and what lies unread beside them.

The order is that of transformers' `_get_resolved_checkpoint_files` (modeling_utils.py): a file that
config.json names, then model.safetensors, then the shards of model.safetensors.index.json. A
directory without any of them is refused, and the refusal says what it holds instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoints.safetensors_file import TensorRef, read_header, refuse_pointer, same_values
from common.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# The field of config.json by which transformers 5 finds weights under another name.
NAMED = "transformers_weights"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WEIGHTS = ("*.safetensors", *PICKLES, "*.gguf", "*.h5", "*.msgpack")
# What trainers keep beside weights; none of it is a model.
_TRAINING = re.compile(r"training_args\.bin|optimizer\.|scheduler\.pt|scaler\.pt|rng_state")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_STEP = re.compile(r"checkpoint-(\d+)")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: the file is missing; a checkpoint directory holds it beside the weights"
        ) from error
    except (OSError, ValueError) as error:
        refuse_pointer(path)
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error}); fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object")
    return value


def has_weights(path: Path) -> bool:
    """Whether a directory holds safetensors under a name that transformers looks for."""
    return (path / SINGLE).is_file() or (path / INDEX).is_file()


def find_weights(
    path: Path, raw: Mapping[str, Any], ignored: re.Pattern[str]
) -> tuple[dict[str, TensorRef], list[str]]:
    """Every tensor of the directory's weights by its name on disk, and notes on files that were not
    read.

    raw: config.json. ignored: tensors that may be missing. Raises CheckpointError.
    """
    named = raw.get(NAMED)
    first = SINGLE if named is None else named
    if not isinstance(first, str) or Path(first).name != first:
        raise CheckpointError(
            f"{path / 'config.json'}: field {NAMED!r} is {named!r}, which is no file name"
        )
    if named is not None and not (path / first).is_file():
        raise CheckpointError(
            f"{path / first}: named by {NAMED!r} in config.json, but missing; fetch it again"
        )
    if (path / first).is_file() and not first.endswith(".index.json"):
        refs = read_header(path / first)
        read = [first]
    elif (path / first).is_file() or (path / INDEX).is_file():
        index = first if (path / first).is_file() else INDEX
        refs, read = _sharded(path, index, ignored)
    else:
        raise CheckpointError(f"{path}: no safetensors weights here; {what_instead(path)}")
    return refs, _unread(path, read)


def _sharded(
    path: Path, index: str, ignored: re.Pattern[str]
) -> tuple[dict[str, TensorRef], list[str]]:
    """The tensors of all shards that an index names, and the files. As in transformers, whatever a
    shard holds counts, named in the index or not."""
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path / index}: field 'weight_map' is missing or empty; fetch the file again"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{path / index}: tensor {name} points to {shard!r}, which is no file name"
            )
    shards = sorted(set(weight_map.values()))
    refs: dict[str, TensorRef] = {}
    for shard in shards:
        if not (path / shard).is_file():
            raise CheckpointError(
                f"{path / shard}: shard named in {index} is missing; fetch it again, "
                f"or remove {index} if it is left from an earlier save"
            )
        for name, ref in read_header(path / shard).items():
            if name in refs and not same_values(refs[name], ref):
                raise CheckpointError(
                    f"{path / shard}: tensor {name} is also in {refs[name].path.name}, with other "
                    "values; "
                    "shards of two saves are mixed here, fetch the checkpoint again"
                )
            refs[name] = ref
    for name, shard in weight_map.items():
        if name not in refs and not ignored.search(name):
            raise CheckpointError(
                f"{path / shard}: tensor {name} is missing, {index} says it is here; fetch the "
                "shard again"
            )
    return refs, [index, *shards]


def _unread(path: Path, read: list[str]) -> list[str]:
    """Notes on weights in the directory that are not the ones read."""
    notes = []
    if (path / ADAPTER).is_file():
        notes.append(
            f"the adapter beside the weights ({ADAPTER}) is not applied; give it in a directory "
            "of its own if it should be"
        )
    others = [
        name
        for name in [*(p.name for pattern in _WEIGHTS for p in sorted(path.glob(pattern))), INDEX]
        if (path / name).is_file()
        and name not in read
        and not name.startswith("adapter_model")
        and not _TRAINING.match(name)
    ]
    if others:
        listed = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        notes.append(f"weights read from {read[0]}, as transformers does; not read: {listed}")
    return notes


def what_instead(path: Path) -> str:
    """What a directory without weights holds, and what to do about it: the end of an error's
    sentence."""
    names = sorted(p.name for p in path.iterdir())
    gone = next((n for n in names if (path / n).is_symlink() and not (path / n).exists()), None)
    if gone is not None:
        return (
            f"{gone} is a link to a file that is gone ({(path / gone).readlink()}); "
            "fetch the checkpoint again"
        )
    shards = [n for n in names if _SHARD.fullmatch(n)]
    if shards:
        return (
            f"the shards are here ({shards[0]}, {len(shards)} in all) but not {INDEX}, "
            "which says what they hold; fetch that file again"
        )
    safetensors = [n for n in names if n.endswith(".safetensors")]
    variant = next((n for n in safetensors if re.fullmatch(r"model\.[^.]+\.safetensors", n)), None)
    if variant is not None:
        return f"{variant} is a variant; rename it to {SINGLE} if it is the one to serve"
    variant = next(
        (n for n in names if re.fullmatch(r"model\.safetensors\.index\.[^.]+\.json", n)), None
    )
    if variant is not None:
        return (
            f"{variant} is the index of a variant; rename it to {INDEX} if it is the one to serve"
        )
    if any(n.startswith("consolidated") for n in names):
        return (
            "consolidated weights are in Mistral's own layout; give the Hugging Face layout of "
            "this model "
            "(transformers has a conversion script for each family)"
        )
    if safetensors:
        return (
            f"{safetensors[0]} has a name that transformers does not read; "
            f"rename it to {SINGLE} if it is the model"
        )
    inside = places(path)
    if inside:
        return f"the weights are in a directory below; give {' or '.join(inside)}"
    if any(n.startswith("global_step") for n in names) or "zero_to_fp32.py" in names:
        return (
            "this is DeepSpeed's partitioned state; join it with its zero_to_fp32.py "
            "and give the directory it writes"
        )
    if any(p.suffix == ".distcp" for p in path.rglob("*.distcp")):
        return (
            "this is torch's distributed (FSDP) state; "
            "merge it with `accelerate merge-weights` first"
        )
    pickles = [
        n for p in PICKLES for n in sorted(f.name for f in path.glob(p)) if not _TRAINING.match(n)
    ]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code and is never read: convert it to "
            "safetensors first "
            "(load it with transformers where you trust it, then save_pretrained)"
        )
    gguf = next((n for n in names if n.endswith(".gguf")), None)
    if gguf is not None:
        return f"{gguf} is llama.cpp's format; give the original Hugging Face directory"
    return f"expected {SINGLE}, or shards with {INDEX}"


def places(path: Path) -> list[str]:
    """Up to four directories below that hold a model: a trainer's steps, the last first, or the
    hub's snapshots."""
    hub = path / "snapshots"
    folders = [p for p in (hub if hub.is_dir() else path).iterdir() if p.is_dir()]
    steps = sorted(
        (p for p in folders if _STEP.fullmatch(p.name) and _holds_model(p)),
        key=lambda p: int(p.name.split("-")[1]),
        reverse=True,
    )
    found = steps or sorted(p for p in folders if not p.name.startswith(".") and _holds_model(p))
    return [str(p) for p in found[:4]]


def _holds_model(path: Path) -> bool:
    return has_weights(path) or (path / "config.json").is_file() or (path / ADAPTER).is_file()
