"""A store as versions 2 and 3 of the format laid it out: a file for each tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common import Store
from common.checkpoints.safetensors_file import write_file

FILE_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
"""Of a Mixtral's projections, which version 2 used."""


def write_older(store: Store, version: int) -> None:
    """Rewrite a store of Mixtrals in place."""
    manifest, path = store.manifest, store.path
    arrays = {i: store.objects.ref(i).read() for i in manifest.objects}
    for shard in (path / "objects").iterdir():
        shard.unlink()
    for object_id, array in arrays.items():
        folder = path / "objects" / object_id[:2]
        folder.mkdir(exist_ok=True)
        write_file(folder / f"{object_id}.safetensors", {"tensor": array})
    value = json.loads((path / "store.json").read_text())
    (path / value["index"]["file"]).unlink()
    for field in ("checksum", "index", "own_experts"):
        del value[field]
    value["version"] = version
    for written, tenant in zip(value["tenants"], manifest.tenants, strict=True):
        written["tensors"] = dict(tenant.tensors)
    value["merged"] = {str(slot): dict(ids) for slot, ids in manifest.merged.items()}
    value["residuals"] = list(manifest.residuals)
    value["objects"] = {
        i: {"dtype": a.dtype.name, "shape": list(a.shape), "bytes": a.nbytes}
        for i, a in arrays.items()
    }
    if version == 2:
        _name_projections_as_files_do(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    value["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    Path(path / "store.json").write_text(json.dumps(value))


def _name_projections_as_files_do(value: dict[str, Any]) -> None:
    value["merged"] = {
        slot: {FILE_NAMES[p]: i for p, i in ids.items()} for slot, ids in value["merged"].items()
    }
    for residual in value["plan"]["residuals"]:
        for part in residual[3]:
            part[0] = FILE_NAMES[part[0]]
