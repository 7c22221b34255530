"""Where the base of a PEFT adapter lies: said by the user, on this machine, never fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.checkpoints.peft_config import AdapterConfig
from common.errors import CheckpointError


def find_base(config: AdapterConfig, given: Path | None, beside: tuple[Path, ...]) -> Path:
    """The base's directory: `given`, which may be the name of a model in the hub's cache, else the
    one that adapter_config.json names.

    That is looked for from the current directory, from the adapter's and the one around it, among
    `beside`, the other checkpoints of the same command, and in the hub's cache. Raises
    CheckpointError that says where it was looked for.
    """
    if given is not None:
        found = given if given.is_dir() else _cached(str(given), None)
        if found is None:
            raise CheckpointError(
                f"{given}: no such directory, nor a model in the hub's cache; give the "
                "adapter's base"
            )
        return found
    name = config.base
    if name is None:
        raise CheckpointError(
            f"{config.path}: field 'base_model_name_or_path' is empty; name the adapter's base "
            "with --base"
        )
    adapter = config.path.parent.resolve()
    for place in _places(name, adapter):
        if (place / "config.json").is_file() and place.resolve() != adapter:
            return place
    parts = Path(name).parts
    for place in beside:
        if place.parts[-len(parts) :] == parts:
            return place
    cached = _cached(name, config.revision)
    if cached is not None:
        return cached
    raise CheckpointError(
        f"{config.path}: field 'base_model_name_or_path' names {name!r}, which is neither a "
        f"directory here or beside {adapter}, nor another checkpoint of this command, nor in the "
        "hub's cache; name the adapter's base with --base, or fetch it first "
        "(hf download), as nothing is downloaded here"
    )


def _places(name: str, adapter: Path) -> Iterator[Path]:
    path = Path(name)
    yield path
    if path.is_absolute():  # where the adapter was trained; here both may have been moved together
        yield adapter.parent / path.name
        return
    yield adapter / path
    yield adapter.parent / path
    yield adapter.parent / path.name


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a hub repository that is in the cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
