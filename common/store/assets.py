"""Tenants' small files: tokenizers, configs, chat templates, in folders named by their content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoints.checkpoint import read_asset
from common.checkpoints.safetensors_file import fsync


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
