"""What planning measured that no budget changes, kept in the store: hours for a large model,
megabytes on disk.

So `moetel plan` shows in a second what a build measured, and a store is planned anew for another
budget or policy without measuring again. Whatever the numbers rest on is in their key: with other
weights, calibration or traffic they are measured anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from common.plan.profile import Profile
from common.planning.losses import Losses
from common.planning.residual_fit import Spectrum
from common.store import unfinished
from common.store.objects import content_id
from common.store.store import Store
from common.version import __version__

REVISION = 4
"""Part of every key: raise it when the same weights would be measured otherwise."""

# Seconds between two writings of what is measured: they cost less than a hundredth of that.
WRITE_SECONDS = 30.0

Spectra = Mapping[tuple[int, int], list[list[Spectrum]]]


@dataclass(frozen=True)
class Measurements:
    """key: of `key_of`. losses: of tenants' experts in each other's place.

    ridge: how far fits are held to mixtures; None: not chosen yet.
    fitted: position -> float64 [tenants], what the copy that is fitted there costs.
    spectra: (set of curves, position) -> of each tenant's projections.
    """

    key: str
    losses: Losses
    ridge: float | None = None
    fitted: Mapping[int, np.ndarray] = field(default_factory=dict)
    spectra: Spectra = field(default_factory=dict)

    @property
    def worth_keeping(self) -> bool:
        """Whether they are more than what the store's distances say at once."""
        return bool(self.losses.measured or self.spectra)

    def to_json(self, put: Callable[[np.ndarray], str]) -> dict[str, Any]:
        """For a manifest; arrays go through `put` as bytes, which returns an object's id."""
        of_losses = {f.name: getattr(self.losses, f.name) for f in fields(Losses)}
        tables = {name: value for name, value in of_losses.items() if isinstance(value, np.ndarray)}
        if self.fitted:
            tables["fitted_positions"] = np.array(sorted(self.fitted), dtype=np.int64)
            tables["fitted"] = np.stack([self.fitted[p] for p in sorted(self.fitted)])
        if self.spectra:
            keys = sorted(self.spectra)
            # [curves and positions, tenants, projections], and [.., components] of the values.
            tables["spectra_places"] = np.array(keys, dtype=np.int64)
            tables["spectra_shapes"] = np.array(
                [s.shape for s in self.spectra[keys[0]][0]], dtype=np.int64
            )
            for name in ("total", "sign"):
                tables[f"spectra_{name}"] = np.array(
                    [[[getattr(s, name) for s in row] for row in self.spectra[key]] for key in keys]
                )
            most = max(len(s.values) for key in keys for row in self.spectra[key] for s in row)
            values = np.zeros((*tables["spectra_total"].shape, most))
            for i, key in enumerate(keys):
                for t, row in enumerate(self.spectra[key]):
                    for j, s in enumerate(row):
                        values[i, t, j, : len(s.values)] = s.values
            tables["spectra_values"] = values
        return {
            "key": self.key,
            "unit": self.losses.unit,
            "tenants": list(self.losses.tenants),
            "measured": list(self.losses.measured),
            "ridge": self.ridge,
            "tables": {
                name: {
                    "object": put(np.ascontiguousarray(table).reshape(-1).view(np.uint8)),
                    "dtype": table.dtype.name,
                    "shape": list(table.shape),
                }
                for name, table in tables.items()
            },
        }

    @classmethod
    def from_store(cls, store: Store) -> Measurements | None:
        """What a store keeps, None if it keeps nothing. Raises StoreError where it is damaged."""
        value = store.manifest.measurements
        if value is None:
            return None
        objects = store.objects
        return cls.from_json(value, lambda object_id: objects.read(objects.ref(object_id)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], read: Callable[[str], np.ndarray]) -> Measurements:
        """What `to_json` made. read: what an array was put as -> its bytes, uint8."""
        tables = {
            name: read(entry["object"]).view(entry["dtype"]).reshape(entry["shape"])
            for name, entry in value["tables"].items()
        }
        losses = {f.name: tables[f.name] for f in fields(Losses) if f.name in tables}
        fitted, spectra = {}, {}
        if "fitted" in tables:
            fitted = dict(zip(tables["fitted_positions"].tolist(), tables["fitted"], strict=True))
        if "spectra_places" in tables:
            shapes = [tuple(shape) for shape in tables["spectra_shapes"].tolist()]
            each = (tables[f"spectra_{name}"] for name in ("values", "total", "sign"))
            for place, values, totals, signs in zip(
                tables["spectra_places"].tolist(), *each, strict=True
            ):
                spectra[tuple(place)] = [
                    [
                        Spectrum(s, v, float(total), float(sign))
                        for s, v, total, sign in zip(shapes, *of_tenant, strict=True)
                    ]
                    for of_tenant in zip(values, totals, signs, strict=True)
                ]
        found = Losses(
            tenants=tuple(value["tenants"]),
            measured=tuple(value["measured"]),
            unit=value["unit"],
            **losses,
        )
        return cls(value["key"], found, value["ridge"], fitted, spectra)


class MeasurementsFile:
    """Where a planner writes what it measures while it measures, and finds what one before it
    had."""

    def __init__(self, path: Path):
        self._path, self._written = path, time.monotonic()

    def read(self) -> Measurements | None:
        found = unfinished.read(self._path)
        if found is None:
            return None
        about, refs = found
        return Measurements.from_json(about, lambda name: refs[name].read())

    def keep(self, found: Callable[[], Measurements]) -> None:
        """Write them, unless that was done a moment ago. Raises StoreError."""
        if time.monotonic() - self._written >= WRITE_SECONDS:
            unfinished.write(self._path, found().to_json)
            self._written = time.monotonic()


def key_of(store: Store, profiles: Mapping[str, Profile], traffic: np.ndarray) -> str:
    """Of all that measurements rest on: tenants' experts in their order, profiles, shares of
    traffic float64 [tenants], and the code."""
    family, spec = store.family, store.experts
    experts = [
        [
            tenant.tensors[family.expert_tensor(tenant.config, layer, expert, projection)]
            for layer in range(spec.num_layers)
            for expert in range(spec.num_experts)
            for projection, _ in spec.projections
        ]
        for tenant in store.manifest.tenants
    ]
    measured = {
        name: profiles[name].to_json(content_id) for name in store.tenants if name in profiles
    }
    basis = [
        __version__,
        REVISION,
        store.dtype,
        spec.top_k,
        store.tenants,
        experts,
        measured,
        traffic.tolist(),
    ]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
