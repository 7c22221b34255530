"""store.json: the one file that says what a store is. Replacing it is what makes a change happen.

Format 1, documented in docs/store-format.md. The checksum covers the rest of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoints.safetensors_file import fsync
from common.consolidation import Plan
from common.errors import MoetelError, StoreError
from common.families import FAMILIES, Family, ModelConfig

FORMAT = "moetel-store"
VERSION = 1
FILE = "store.json"


@dataclass(frozen=True)
class Tenant:
    """One tenant as the store keeps it.

    tensors: canonical name -> object id. assets_folder: folder below `assets/`. notes: what was converted on the way
        in.
    """

    name: str
    source: str
    config: ModelConfig
    tensors: Mapping[str, str]
    assets_folder: str
    assets: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What store.json holds. objects: id -> {dtype, shape, bytes}; similarity: {object, layers}."""

    family: Family
    dtype: str
    tenants: tuple[Tenant, ...]
    plan: Plan
    objects: Mapping[str, Mapping[str, Any]]
    similarity: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "family": self.family.name,
            "dtype": self.dtype,
            "provenance": dict(self.provenance),
            "tenants": [
                {
                    "name": t.name,
                    "source": t.source,
                    "config": dict(t.config.raw),
                    "notes": list(t.notes),
                    "assets_folder": t.assets_folder,
                    "assets": {k: dict(v) for k, v in t.assets.items()},
                    "tensors": dict(t.tensors),
                }
                for t in self.tenants
            ],
            "plan": self.plan.to_json(),
            "similarity": dict(self.similarity),
            "objects": {k: dict(v) for k, v in self.objects.items()},
        }

    def write(self, directory: Path) -> None:
        """Replace the directory's manifest in one step."""
        body = self.to_json()
        text = json.dumps({"checksum": _checksum(body), **body}, indent=1)
        partial = directory / f"{FILE}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        fsync(partial)
        os.replace(partial, directory / FILE)
        fsync(directory)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises StoreError if there is no store, it is damaged, or of a version that this code does not know."""
        path = directory / FILE
        if not path.is_file():
            what = "there is no store.json in it" if directory.is_dir() else "no such directory"
            raise StoreError(f"{directory}: not a store, {what}; make one with `moetel build`")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: damaged ({error}); build the store again") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise StoreError(f"{path}: not the manifest of a Moetel store")
        if value.get("version") != VERSION:
            raise StoreError(
                f"{path}: format version {value.get('version')!r}, this code reads version {VERSION}; "
                "build the store again or use the Moetel version that wrote it"
            )
        checksum = value.pop("checksum", None)
        if checksum != _checksum(value):
            raise StoreError(f"{path}: damaged, its checksum does not match; build the store again")
        try:
            family = FAMILIES[value["family"]]
            tenants = tuple(
                Tenant(
                    name=t["name"],
                    source=t["source"],
                    config=family.parse_config(t["config"], f"{path}: tenant {t['name']}"),
                    tensors=t["tensors"],
                    assets_folder=t["assets_folder"],
                    assets=t["assets"],
                    notes=tuple(t["notes"]),
                )
                for t in value["tenants"]
            )
            plan = Plan.from_json(value["plan"])
            return cls(
                family, value["dtype"], tenants, plan, value["objects"], value["similarity"], value["provenance"]
            )
        except (KeyError, TypeError, MoetelError) as error:
            raise StoreError(
                f"{path}: not understood ({type(error).__name__}: {error}); build the store again"
            ) from error


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
