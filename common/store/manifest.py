"""store.json: the one file that says what a store is. Replacing it is what makes a change happen.

Format 4, documented in docs/store-format.md. Versions 1 to 3, with a file for each tensor and all
names in store.json, are read too. The checksum covers the rest of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.checkpoints.generation_config import GenerationConfig
from common.checkpoints.safetensors_file import fsync
from common.errors import MoetelError, StoreError
from common.families import FAMILIES, Family, ModelConfig
from common.plan.adapted import AdaptedExpert
from common.plan.plan import MERGED, Plan
from common.plan.residual import role_of
from common.store.index import Index
from common.store.shards import SINGLE_OFFSET, Entry

FORMAT = "moetel-store"
VERSION = 4
READABLE = (1, 2, 3, 4)
FILE = "store.json"

COPY, REFERENCE, NONE = OWN_EXPERTS = ("copy", "reference", "none")
"""Tenants' own experts: copied into the store, left in their checkpoints, or dropped but for those
that are resident or can be missed."""

BESIDE = "beside"
"""Entry of `provenance`: names `added` and `removed` since the plan was made; absent if there are
none."""


@dataclass(frozen=True)
class Tenant:
    """One tenant as the store keeps it.

    tensors: canonical name -> object id. assets_folder: folder below `assets/`. notes: what was
        converted on the way
        in. generation: what its files say about generating; None where an older Moetel
        built the store. adapted: experts that an adapter made of others.
    """

    name: str
    source: str
    config: ModelConfig
    tensors: Mapping[str, str]
    assets_folder: str
    assets: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    generation: GenerationConfig | None = None
    adapted: tuple[AdaptedExpert, ...] = ()

    def object_ids(self) -> list[str]:
        """Ids of the objects that it keeps; one may be there several times."""
        return [*self.tensors.values(), *(i for a in self.adapted for i in a.object_ids)]


@dataclass(frozen=True)
class Manifest:
    """What store.json holds.

    objects: id -> where it lies; similarity: {object, layers}.
    merged: slot of a merged copy -> projection -> object id. residuals: object ids of the plan's
        residuals, in order.
    calibration: tenant -> what was measured on its calibration prompts, a `Profile`.
    measurements: what planning measured; None if nothing is kept.
    own_experts: where tenants' experts are that no copy is: one of `OWN_EXPERTS`.
    index_file: of a manifest that was read.
    prediction: what the plan is expected to cost each tenant; None if not known.
    """

    family: Family
    dtype: str
    tenants: tuple[Tenant, ...]
    plan: Plan
    objects: Mapping[str, Entry]
    similarity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    merged: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    residuals: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, Any] | None = None
    measurements: Mapping[str, Any] | None = None
    own_experts: str = COPY
    index_file: str | None = None

    def measured_ids(self) -> list[str]:
        """Ids of the objects that distances, calibration and planning measured."""
        distances = self.similarity["object"]
        tables = {} if self.measurements is None else self.measurements["tables"]
        return [
            *([] if distances is None else [distances]),
            *(i for one in self.calibration.values() for i in one.get("objects", {}).values()),
            *(entry["object"] for entry in tables.values()),
        ]

    def object_ids(self) -> list[str]:
        """Ids of all objects that this manifest refers to; one may be there several times."""
        return [
            *(i for tenant in self.tenants for i in tenant.object_ids()),
            *(i for ids in self.merged.values() for i in ids.values()),
            *self.residuals,
            *self.measured_ids(),
        ]

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
                    "generation": None if t.generation is None else t.generation.to_json(),
                    "adapted": [a.to_json() for a in t.adapted],
                }
                for t in self.tenants
            ],
            "plan": self.plan.to_json(),
            "calibration": dict(self.calibration),
            "prediction": None if self.prediction is None else dict(self.prediction),
            "measurements": None if self.measurements is None else dict(self.measurements),
            "similarity": dict(self.similarity),
            "own_experts": self.own_experts,
        }

    def write(self, directory: Path) -> None:
        """Replace the directory's manifest in one step, its index written first."""
        body = {**self.to_json(), "index": self._index().write(directory)}
        lines = {"checksum": _checksum(body), **body}.items()
        text = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in lines)
        partial = directory / f"{FILE}.partial"
        partial.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
        fsync(partial)
        os.replace(partial, directory / FILE)
        fsync(directory)

    def _index(self) -> Index:
        named: dict[str, list[str | None]] = {"residuals": list(self.residuals)}
        for i, tenant in enumerate(self.tenants):
            names = sorted(self.family.all_shapes(tenant.config))
            named[f"tenants.{i}"] = [tenant.tensors.get(name) for name in names]
        projections = self.tenants[0].config.experts.projections
        slots = sorted(self.merged)
        named["merged"] = [self.merged[slot][p] for slot in slots for p, _ in projections]
        return Index(self.objects, named)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises StoreError if there is no store, it is damaged, or of a version that this code
        does not know."""
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
        if value.get("version") not in READABLE:
            raise StoreError(
                f"{path}: format version {value.get('version')!r}, this code reads versions 1 to "
                f"{VERSION}; "
                "build the store again or use the Moetel version that wrote it"
            )
        checksum = value.pop("checksum", None)
        if checksum != _checksum(value):
            raise StoreError(f"{path}: damaged, its checksum does not match; build the store again")
        index = Index.read(directory, value["index"]) if "index" in value else None
        try:
            family = FAMILIES[value["family"]]
            configs = [
                family.parse_config(t["config"], f"{path}: tenant {t['name']}")
                for t in value["tenants"]
            ]
            plan = Plan.from_json(value["plan"])
            objects, tensors, merged, residuals = (
                _from_json(value) if index is None else _from_index(index, family, configs, plan)
            )
            tenants = tuple(
                Tenant(
                    name=t["name"],
                    source=t["source"],
                    config=config,
                    tensors=ids,
                    assets_folder=t["assets_folder"],
                    assets=t["assets"],
                    notes=tuple(t["notes"]),
                    generation=GenerationConfig.from_json(t["generation"])
                    if t.get("generation")
                    else None,
                    adapted=tuple(AdaptedExpert.from_json(a) for a in t.get("adapted", ())),
                )
                for t, config, ids in zip(value["tenants"], configs, tensors, strict=True)
            )
            if set(merged) != {i for i, c in enumerate(plan.copies) if c.owner == MERGED}:
                raise StoreError("the merged copies of the plan and of the store differ")
            if len(residuals) != len(plan.residuals):
                raise StoreError(
                    f"{len(residuals)} records for {len(plan.residuals)} residuals of the plan"
                )
            return cls(
                family=family,
                dtype=value["dtype"],
                tenants=tenants,
                plan=plan,
                objects=objects,
                similarity=value["similarity"],
                provenance=value["provenance"],
                merged=merged,
                residuals=residuals,
                calibration=value.get("calibration", {}),
                prediction=value.get("prediction"),
                measurements=value.get("measurements"),
                own_experts=value.get("own_experts", COPY),
                index_file=value["index"]["file"] if index is not None else None,
            )
        except (KeyError, TypeError, ValueError, MoetelError) as error:
            raise StoreError(
                f"{path}: not understood ({type(error).__name__}: {error}); build the store again"
            ) from error


Named = tuple[dict[str, Entry], list[dict[str, str]], dict[int, dict[str, str]], tuple[str, ...]]
"""Objects, each tenant's tensors, merged copies, and residuals."""


def _from_index(index: Index, family: Family, configs: Sequence[ModelConfig], plan: Plan) -> Named:
    tensors = []
    for i, config in enumerate(configs):
        rows = zip(sorted(family.all_shapes(config)), index.named[f"tenants.{i}"], strict=True)
        tensors.append({name: object_id for name, object_id in rows if object_id is not None})
    projections = [name for name, _ in configs[0].experts.projections]
    slots = [i for i, copy in enumerate(plan.copies) if copy.owner == MERGED]
    merged_ids = [i for i in index.named["merged"] if i is not None]
    per_slot = zip(*[iter(merged_ids)] * len(projections), strict=True)
    merged = {
        slot: dict(zip(projections, ids, strict=True))
        for slot, ids in zip(slots, per_slot, strict=True)
    }
    residuals = tuple(i for i in index.named["residuals"] if i is not None)
    return dict(index.entries), tensors, merged, residuals


def _from_json(value: Mapping[str, Any]) -> Named:
    """Of versions 1 to 3, which have a file for each object."""
    objects = {
        object_id: Entry(
            entry["dtype"],
            tuple(entry["shape"]),
            f"{object_id[:2]}/{object_id}.safetensors",
            SINGLE_OFFSET,
        )
        for object_id, entry in value["objects"].items()
    }
    merged = {
        int(slot): {role_of(projection): i for projection, i in ids.items()}
        for slot, ids in value.get("merged", {}).items()
    }
    tensors = [dict(t["tensors"]) for t in value["tenants"]]
    return objects, tensors, merged, tuple(value.get("residuals", ()))


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
