"""Build a store, add a tenant, remove one.

Every tensor is read once: the same pass checks that it is finite, converts it to the store's type,
measures its distance to the other tenants', hashes it and writes it. A store changes in one step,
the replacement of store.json; a new store appears in one step, the renaming of its directory. A
process killed before that step leaves things as they were, plus files that nothing refers to, which
the next write removes.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.calibration import CalibrationSet, Profile, calibrate
from common.checkpoints import Checkpoint, TensorRef, TensorSource, open_checkpoint
from common.checkpoints.safetensors_file import fsync
from common.consolidation import MERGED, Plan, plan_all
from common.dtypes import BY_NAME, common_dtype, is_lossless
from common.errors import CheckpointError, PlanError, StoreError, UnknownTenantError
from common.families import Family, ModelConfig
from common.generation import GenerationConfig
from common.policies import DEFAULT_EXTRA, DEFAULT_POLICY, POLICIES, Planner
from common.progress import Progress, silent
from common.similarity import Distances, compare, tenant_pairs
from common.store.beside import BESIDE, leave
from common.store.check_text import decide_generation
from common.store.lock import FILE as LOCK_FILE
from common.store.lock import exclusive
from common.store.manifest import Manifest, Tenant
from common.store.measurements import Measurements, objects_of
from common.store.objects import Objects, asset_damage, check_dtype, save_assets
from common.store.store import Store, is_store, non_expert_bytes
from common.units import format_bytes, is_whole
from common.version import __version__

logger = logging.getLogger(__name__)

TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# Bytes of tensors that the threads of a build hold at once; one thread may exceed it with its one
# tensor of every tenant.
IN_FLIGHT_BYTES = 1 << 30

HALVES = "--dtype bfloat16 takes half the memory, and rounds"

Slots = int | Literal["all"] | None


@dataclass(frozen=True)
class Settings:
    """How a store is planned; kept in its provenance, and applied again when a tenant is added or
    removed.

    slots, budget_bytes, extra: at most one of them; see `build_store`. traffic: tenant -> requests
        beside others' one.
    """

    policy: str = DEFAULT_POLICY
    slots: Slots = None
    budget_bytes: int | None = None
    extra: float | None = None
    traffic: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        if self.policy not in POLICIES:
            raise PlanError(f"no policy {self.policy!r}; there is: {', '.join(POLICIES)}")
        if sum(v is not None for v in (self.slots, self.budget_bytes, self.extra)) > 1:
            raise PlanError("give one of slots, a budget, and a share of extra bytes")
        if (
            self.slots is not None
            and self.slots != "all"
            and (not is_whole(self.slots) or int(self.slots) < 0)
        ):
            raise PlanError(f"slots is {self.slots!r}; give a whole number from 0, or 'all'")
        if self.budget_bytes is not None and not is_whole(self.budget_bytes):
            raise PlanError(f"budget_bytes is {self.budget_bytes!r}; give a whole number of bytes")
        if self.extra is not None:
            check_extra(self.extra)
            if self.extra > 0 and not POLICIES[self.policy].uses_extra:
                raise PlanError(
                    f"policy {self.policy!r} keeps one copy a position and has no use for extra "
                    "bytes; "
                    "leave extra out, or choose one of: "
                    f"{', '.join(n for n, p in POLICIES.items() if p.uses_extra)}"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "slots": self.slots,
            "budget_bytes": self.budget_bytes,
            "extra": self.extra,
            "traffic": dict(self.traffic),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Settings:
        return cls(
            value["policy"],
            value["slots"],
            value["budget_bytes"],
            value.get("extra"),
            value.get("traffic", {}),
        )


@dataclass
class _Source:
    """A tenant on its way into a store; `ids` holds what is stored already.

    notes: of a tenant that was stored before, all that was said of it; read_notes: what its
        checkpoint's reader says.
    """

    name: str
    origin: str
    family: Family
    config: ModelConfig
    refs: Mapping[str, TensorSource]
    assets: Mapping[str, Path | bytes]
    ids: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    read_notes: tuple[str, ...] = ()
    generation: GenerationConfig | None = None

    @classmethod
    def from_checkpoint(cls, name: str, checkpoint: Checkpoint) -> _Source:
        """Raises CheckpointError for files that serving could not use."""
        generation = decide_generation(name, checkpoint)
        return cls(
            name,
            str(checkpoint.path.resolve()),
            checkpoint.family,
            checkpoint.config,
            checkpoint.tensors,
            checkpoint.assets,
            read_notes=(*checkpoint.notes, *generation.notes()),
            generation=generation,
        )

    @classmethod
    def from_store(cls, store: Store, name: str) -> _Source:
        tenant = store.tenant(name)
        refs: dict[str, TensorSource] = {
            tensor: store.ref(name, tensor) for tensor in tenant.tensors
        }
        assets: dict[str, Path | bytes] = {}
        for file, entry in tenant.assets.items():
            # They are copied and hashed anew: damage would become what the store says is right.
            assets[file] = asset = store.assets_dir(name) / file
            what = asset_damage(asset, entry["sha256"])
            if what is not None:
                raise StoreError(
                    f"{asset}: {what}; restore it from a backup or build the store again"
                )
        return cls(
            name,
            tenant.source,
            store.family,
            tenant.config,
            refs,
            assets,
            dict(tenant.tensors),
            tenant.notes,
            generation=tenant.generation,
        )


def build_store(
    path: str | Path,
    tenants: Mapping[str, str | Path] | Sequence[tuple[str, str | Path]],
    *,
    policy: str = DEFAULT_POLICY,
    slots: Slots = None,
    budget_bytes: int | None = None,
    extra: float | None = None,
    calibration: Mapping[str, CalibrationSet] | None = None,
    traffic: Mapping[str, float] | None = None,
    dtype: str = "auto",
    configs: Mapping[str, str | Path] | None = None,
    progress: Progress = silent,
) -> Store:
    """Build a store from checkpoints, replacing the store at `path` if there is one.

    tenants: name -> checkpoint directory, in the order that the plan counts them.
    policy: one of `common.policies.POLICIES`; docs/consolidation.md compares them.
    slots: resident copies, nothing beside them; "all" shares nothing but identical experts.
    budget_bytes: device bytes for copies, residuals and one tenant's non-expert weights, in the
        store's type.
    extra: bytes beyond one copy a position, as a share of one model's expert bytes. Without any of
        the three: one copy a position and, if the policy can use it, `DEFAULT_EXTRA` for each
            tenant.
    calibration: tenant -> examples of its use, measured with the family's engine before planning,
        and kept.
    traffic: tenant -> how many requests it has where a tenant that is not named has one.
    configs: tenant -> config.json, for T5X and Orbax checkpoints, which hold none; see
        `open_checkpoint`.
    dtype: the store's type; auto is that of all tensors of all tenants if they agree, else float32:
        nothing is rounded.

    Raises CheckpointError, PlanError or StoreError; what was at `path` is then as it was.
    """
    path = Path(path)
    settings = Settings(policy, slots, budget_bytes, extra, dict(traffic or {}))
    settings.check()
    pairs = list(tenants.items()) if isinstance(tenants, Mapping) else list(tenants)
    if not pairs:
        raise StoreError("a store needs at least one tenant; give --tenant NAME=CHECKPOINT")
    for name, _ in pairs:
        _check_name(name)
    names = [name for name, _ in pairs]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise StoreError(f"tenant name {repeated[0]!r} is given twice; each tenant needs its own")
    configs = configs or {}
    for what, given in (
        ("a config", configs),
        ("calibration", calibration or {}),
        ("traffic", traffic or {}),
    ):
        strangers = sorted(set(given) - set(names))
        if strangers:
            raise StoreError(
                f"{what} is given for {strangers[0]!r}, which is no tenant of this build"
            )
    sources = [
        _Source.from_checkpoint(name, open_checkpoint(place, configs.get(name)))
        for name, place in pairs
    ]
    _check_agreement(sources)
    if dtype == "auto":
        types = sorted({ref.dtype for s in sources for ref in s.refs.values()})
        dtype = common_dtype(types)
        if len(types) > 1:
            listed = f"{', '.join(types[:-1])} and {types[-1]}"
            for source in sources:
                if any(ref.dtype != dtype for ref in source.refs.values()):
                    note = f"the store is {dtype}, which holds {listed} without rounding; {HALVES}"
                    source.read_notes = (*source.read_notes, note)
    check_dtype(dtype)
    amount = _resolve(settings, sources, dtype)
    if path.exists() and not is_store(path) and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(
            f"{path}: exists and is not a store; name another place, or remove it first"
        )
    with _new_or_existing(path) as directory:
        manifest = _assemble(
            directory, sources, settings, amount, dtype, None, {}, calibration or {}, progress
        )
        _commit(directory, manifest)
    return Store.open(path)


def add_tenant(
    path: str | Path,
    name: str,
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    calibration: CalibrationSet | None = None,
    progress: Progress = silent,
) -> Store:
    """Add a tenant and plan again with the settings that the store was built with; `extend_store`
    keeps the plan.

    config: as for `build_store`. calibration: examples of the new tenant's use.

    Raises CheckpointError, PlanError or StoreError; the store is then as it was.
    """
    examples = {} if calibration is None else {name: calibration}
    return _change(Path(path), with_tenant(name, checkpoint, config), examples, progress)


def with_tenant(
    name: str, checkpoint: str | Path, config: str | Path | None
) -> Callable[[Store], list[_Source]]:
    """What makes the sources of a store's tenants and, last, a new one's. Raises StoreError for a
    name that is not allowed, and when it is called CheckpointError or StoreError."""
    _check_name(name)

    def with_it(store: Store) -> list[_Source]:
        if name in store.tenants:
            raise StoreError(
                f"tenant {name!r} is in this store already; remove it first or choose another name"
            )
        sources = [_Source.from_store(store, tenant) for tenant in store.tenants]
        sources.append(_Source.from_checkpoint(name, open_checkpoint(checkpoint, config)))
        _check_agreement(sources)
        return sources

    return with_it


def replan(
    path: str | Path,
    *,
    policy: str | None = None,
    slots: Slots = None,
    budget_bytes: int | None = None,
    extra: float | None = None,
    calibration: Mapping[str, CalibrationSet | Profile] | None = None,
    traffic: Mapping[str, float] | None = None,
    known: Measurements | None = None,
    progress: Progress = silent,
) -> Store:
    """Plan a store anew for its tenants. Arguments as for `build_store`, but calibration may be
    what was measured.

    known: `Planner.measurements` of the same tenants, calibration and traffic, so that nothing is
        measured again; what the store keeps is used in any case.

    policy and traffic default to the store's own. Without any of slots, budget_bytes and extra
    there is as much memory as the store was planned with last, except that a policy without a use
    for extra bytes takes none.

    Raises PlanError, StoreError, RequestError; the store is then as it was.
    """
    old = Settings.from_json(Store.open(path).manifest.provenance["settings"])
    if slots is None and budget_bytes is None and extra is None:
        slots, budget_bytes, extra = old.slots, old.budget_bytes, old.extra
        if policy in POLICIES and not POLICIES[policy].uses_extra:
            extra = None
    settings = Settings(
        policy or old.policy,
        slots,
        budget_bytes,
        extra,
        old.traffic if traffic is None else traffic,
    )
    settings.check()

    def the_same(store: Store) -> list[_Source]:
        return [_Source.from_store(store, t) for t in store.tenants]

    return _change(Path(path), the_same, calibration or {}, progress, settings, known)


def remove_tenant(
    path: str | Path, name: str, *, keep_plan: bool = False, progress: Progress = silent
) -> Store:
    """Remove a tenant, free what only it used, and plan again.

    keep_plan: do not plan again; what other tenants are served stays bit for bit. Copies that serve
        none of them are dropped, and slots are numbered anew in the same order.

    Raises UnknownTenantError, StoreError; the store is then as it was.
    """

    def without_it(store: Store) -> list[_Source]:
        if name not in store.tenants:
            raise UnknownTenantError(name, store.tenants)
        if len(store.tenants) == 1:
            raise StoreError(
                f"tenant {name!r} is the only one in this store; delete the directory {store.path} "
                "instead"
            )
        return [_Source.from_store(store, t) for t in store.tenants if t != name]

    if keep_plan:
        return change_beside(
            Path(path), without_it, lambda old, draft, put: leave(old, draft, name), progress
        )
    return _change(Path(path), without_it, {}, progress)


def set_plan(
    path: str | Path,
    plan: Plan,
    merged: Mapping[int, Mapping[str, np.ndarray]] | None = None,
    records: Sequence[np.ndarray] = (),
) -> Store:
    """Give a store another plan for the same tenants.

    merged: slot of each merged copy -> projection -> [out, in], converted to the store's type.
    records: uint8 [bytes] of each of `plan.residuals`, in order; see `common.residuals`.

    Raises PlanError, StoreError; the store is then as it was.
    """
    merged = merged or {}
    path = Path(path)
    Store.open(path)
    with _new_or_existing(path) as directory:
        store = Store.open(directory)
        _commit(directory, _with_plan(store, plan, merged, records, None))
    return Store.open(path)


def _with_plan(
    store: Store,
    plan: Plan,
    merged: Mapping[int, Mapping[str, np.ndarray]],
    records: Sequence[np.ndarray],
    prediction: Mapping[str, Any] | None,
) -> Manifest:
    spec, manifest = store.experts, store.manifest
    shapes = dict(spec.projections)
    if (plan.tenants, plan.num_layers, plan.num_experts) != (
        store.tenants,
        spec.num_layers,
        spec.num_experts,
    ):
        raise PlanError(
            f"the plan is for other tenants or another shape than the store {store.path}"
        )
    if set(merged) != {slot for slot, copy in enumerate(plan.copies) if copy.owner == MERGED}:
        raise PlanError("weights must be given for each merged copy of the plan, and for no other")
    if len(records) != len(plan.residuals):
        raise PlanError(f"{len(records)} records for {len(plan.residuals)} residuals of the plan")
    entries: dict[str, dict[str, Any]] = {
        i: dict(manifest.objects[i]) for t in manifest.tenants for i in t.tensors.values()
    }
    for object_id in (
        manifest.similarity["object"],
        *_calibration_objects(manifest.calibration),
        *objects_of(manifest.measurements),
    ):
        if object_id is not None:
            entries[object_id] = dict(manifest.objects[object_id])

    put = _putter(store.objects, entries)
    ids: dict[int, dict[str, str]] = {}
    for slot, matrices in merged.items():
        if {p: tuple(m.shape) for p, m in matrices.items()} != shapes:
            raise PlanError(f"merged copy {slot} has other matrices than {shapes}")
        ids[slot] = {
            p: put(m.astype(BY_NAME[store.dtype], copy=False)) for p, m in matrices.items()
        }
    for residual, record in zip(plan.residuals, records, strict=True):
        if record.dtype != np.uint8 or record.shape != (residual.nbytes(shapes),):
            raise PlanError(
                f"the record of {residual} is {record.dtype} {list(record.shape)}, not what its "
                "parts need"
            )
    kept = tuple(put(record) for record in records)
    provenance = {
        key: value for key, value in manifest.provenance.items() if key != BESIDE
    }  # it is for all tenants
    return replace(
        manifest,
        plan=plan,
        objects=entries,
        merged=ids,
        residuals=kept,
        prediction=prediction,
        provenance=provenance,
    )


def _calibration_objects(calibration: Mapping[str, Any]) -> list[str]:
    """Ids of the objects that a manifest's calibration names."""
    return [
        object_id
        for tenant in calibration.values()
        for object_id in tenant.get("objects", {}).values()
    ]


def _change(
    path: Path,
    edit: Callable[[Store], list[_Source]],
    calibration: Mapping[str, CalibrationSet | Profile],
    progress: Progress,
    settings: Settings | None = None,
    known: Measurements | None = None,
) -> Store:
    """Give a store the tenants that `edit` makes of it, planned with its own settings or others.

    known: what planning measured; what the store keeps if not given.
    """
    Store.open(path)  # raises if there is none; what holds is read below, under the lock
    with _new_or_existing(path) as directory:
        store = Store.open(directory)
        sources = edit(store)
        names = [s.name for s in sources]
        strangers = sorted(set(calibration) - set(names))
        if strangers:
            raise UnknownTenantError(strangers[0], tuple(names))
        if settings is None:
            settings = Settings.from_json(store.manifest.provenance["settings"])
            settings = replace(
                settings, traffic={k: v for k, v in settings.traffic.items() if k in names}
            )
        amount = _resolve(settings, sources, store.dtype)
        profiles = {
            name: p
            for name in names
            if name in store.tenants and (p := Profile.from_store(store, name))
        }
        manifest = _assemble(
            directory,
            sources,
            settings,
            amount,
            store.dtype,
            store.distances,
            profiles,
            calibration,
            progress,
            known or Measurements.from_store(store),
        )
        _commit(directory, manifest)
    return Store.open(path)


def change_beside(
    path: Path,
    edit: Callable[[Store], list[_Source]],
    change: Callable[[Store, Store, Callable[[np.ndarray], str]], Manifest],
    progress: Progress,
) -> Store:
    """Give a store the tenants that `edit` makes of it, and the plan that `change` makes of the one
    it has.

    change: (the store before, one with all tensors of the new tenants, what stores an array) -> the
        manifest, its objects left out.
    """
    Store.open(path)
    with _new_or_existing(path) as directory:
        old = Store.open(directory)
        draft = _draft(
            directory, edit(old), old.dtype, old.distances, old.manifest.provenance, progress
        )
        entries = {object_id: dict(entry) for object_id, entry in draft.manifest.objects.items()}
        manifest = change(old, draft, _putter(draft.objects, entries))
        for object_id in (
            *_calibration_objects(manifest.calibration),
            *objects_of(manifest.measurements),
            *(i for ids in manifest.merged.values() for i in ids.values()),
            *manifest.residuals,
        ):
            if object_id not in entries:
                entries[object_id] = dict(old.manifest.objects[object_id])
        _commit(directory, replace(manifest, objects=entries))
    return Store.open(path)


def check_extra(extra: Any) -> None:
    """Raises PlanError for what is no share of one model's expert bytes."""
    if isinstance(extra, bool) or not isinstance(extra, int | float) or not 0 <= extra < 1e6:
        raise PlanError(
            f"extra is {extra!r}; give a share of one model's expert bytes, such as 0.15"
        )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not TENANT_NAME.fullmatch(name):
        raise StoreError(
            f"tenant name {name!r} is not allowed; use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )


def _check_agreement(sources: Sequence[_Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        differences = first.config.experts.differences(other.config.experts)
        if differences:
            raise StoreError(
                f"tenants {first.name!r} and {other.name!r} cannot share experts "
                f"({'; '.join(differences)}); "
                "tenants of one store must be fine-tunes of one architecture"
            )


@dataclass(frozen=True)
class _Amount:
    """slots: positions with a copy, None for everything that tenants have. extra_bytes: for more
    copies, residuals."""

    slots: int | None
    extra_bytes: int = 0


def _resolve(settings: Settings, sources: Sequence[_Source], dtype: str) -> _Amount:
    """How much memory there is for what. Raises PlanError if it cannot be had."""
    spec = sources[0].config.experts
    policy = POLICIES[settings.policy]
    copy_bytes = spec.copy_elements * BY_NAME[dtype].itemsize
    if settings.budget_bytes is not None:
        largest = max(sources, key=lambda s: non_expert_bytes(s.family, s.config, dtype))
        fixed = non_expert_bytes(largest.family, largest.config, dtype)
        if settings.budget_bytes < fixed + copy_bytes:
            raise PlanError(
                f"budget of {format_bytes(settings.budget_bytes)} is too small for one tenant: "
                f"{largest.name!r} needs "
                f"{format_bytes(fixed)} for its non-expert weights and {format_bytes(copy_bytes)} "
                "for each expert; "
                f"give at least {fixed + copy_bytes} bytes"
            )
        room = settings.budget_bytes - fixed
        if room < spec.num_positions * copy_bytes:
            return _Amount(room // copy_bytes)
        return _Amount(
            spec.num_positions, room - spec.num_positions * copy_bytes if policy.uses_extra else 0
        )
    if settings.slots == "all":
        return _Amount(None)
    if settings.slots is not None:
        if settings.slots > spec.num_positions:
            raise PlanError(
                f"{settings.slots} slots, but {spec.num_positions} positions; give "
                f"0..{spec.num_positions}, or 'all', "
                "or a share of extra bytes for more copies"
            )
        return _Amount(settings.slots)
    extra = settings.extra
    if extra is None:
        extra = DEFAULT_EXTRA * len(sources) if policy.uses_extra and len(sources) > 1 else 0.0
    return _Amount(spec.num_positions, int(extra * spec.num_positions * copy_bytes))


def _draft(
    directory: Path,
    sources: Sequence[_Source],
    dtype: str,
    old: Distances | None,
    provenance: Mapping[str, Any],
    progress: Progress,
) -> Store:
    """Put every tensor of every source into `directory`: a store, not yet committed, that shares
    what is identical.

    old: distances of tenants that need not be measured again.
    """
    objects = Objects(directory / "objects")
    matrix = _store_experts(objects, sources, dtype, old, progress)
    _store_non_experts(objects, sources, dtype, progress)
    names = tuple(s.name for s in sources)
    # The plan follows from what is kept (float32), so that planning again from the store gives the
    # same plan.
    distances = Distances(names, matrix.astype(np.float32).astype(np.float64))
    entries = _object_entries(sources, dtype)
    similarity: dict[str, Any] = {"object": None, "layers": distances.layer_summary()}
    if distances.matrix.shape[0]:
        table = distances.matrix.astype(np.float32)
        similarity["object"] = objects.put(table)
        entries[similarity["object"]] = {
            "dtype": "float32",
            "shape": list(table.shape),
            "bytes": table.nbytes,
        }
    tenants = []
    for source in sources:
        folder, files = save_assets(directory / "assets", source.assets)
        tenants.append(
            Tenant(
                source.name,
                source.origin,
                source.config,
                source.ids,
                folder,
                files,
                _notes(source, dtype),
                source.generation,
            )
        )
    # What is planned and measured from here on looks at the tensors through a store that shares
    # nothing.
    everything = plan_all(_contents(sources), distances.tenants)
    return Store(
        directory,
        Manifest(
            sources[0].family, dtype, tuple(tenants), everything, entries, similarity, provenance
        ),
    )


def _assemble(
    directory: Path,
    sources: Sequence[_Source],
    settings: Settings,
    amount: _Amount,
    dtype: str,
    old: Distances | None,
    profiles: Mapping[str, Profile],
    calibration: Mapping[str, CalibrationSet | Profile],
    progress: Progress,
    known: Measurements | None = None,
) -> Manifest:
    """Put every tensor of every source into `directory`, plan, and describe it all.

    known: what planning measured before, used as far as it still holds.
    """
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.to_json(),
        "versions": {
            "moetel": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "safetensors": version("safetensors"),
        },
    }
    draft = _draft(directory, sources, dtype, old, provenance, progress)
    measured = {name: given for name, given in calibration.items() if isinstance(given, Profile)}
    for name, profile in measured.items():
        profile.check(sources[0].config.experts, name)
    asked = {name: given for name, given in calibration.items() if not isinstance(given, Profile)}
    profiles = {
        **profiles,
        **measured,
        **(calibrate(draft, asked, progress=progress) if asked else {}),
    }
    entries = {object_id: dict(entry) for object_id, entry in draft.manifest.objects.items()}
    kept = {
        name: profile.to_json(_putter(draft.objects, entries)) for name, profile in profiles.items()
    }
    draft = Store(directory, replace(draft.manifest, objects=entries, calibration=kept))
    if amount.slots is None:
        return draft.manifest
    planner = Planner(draft, profiles, settings.traffic, progress, known)
    outcome = planner.plan(settings.policy, amount.slots, amount.extra_bytes)
    if planner.measurements.worth_keeping:
        entries = {object_id: dict(entry) for object_id, entry in draft.manifest.objects.items()}
        found = planner.measurements.to_json(_putter(draft.objects, entries))
        draft = Store(directory, replace(draft.manifest, objects=entries, measurements=found))
    return _with_plan(
        draft, outcome.plan, outcome.merged, outcome.records, outcome.prediction.to_json()
    )


def _putter(objects: Objects, entries: dict[str, dict[str, Any]]) -> Callable[[np.ndarray], str]:
    """Stores an array and lists it among a manifest's objects."""

    def put(array: np.ndarray) -> str:
        object_id = objects.put(array)
        entries[object_id] = {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "bytes": array.nbytes,
        }
        return object_id

    return put


def _read(objects: Objects, source: _Source, tensor: str, dtype: str) -> np.ndarray:
    """A tensor in the store's type. What is stored already is compared with its checksum, as new
    tensors are hashed: else distances of damaged weights would be kept, and plans made by them.
    Hashing (1.8 GB/s a thread) costs less than most disks' reading."""
    ref = source.refs[tensor]
    if tensor in source.ids and isinstance(ref, TensorRef):
        return objects.read(ref)
    return _convert(source, tensor, dtype)


def _convert(source: _Source, tensor: str, dtype: str) -> np.ndarray:
    array = source.refs[tensor].read()
    if array.dtype == BY_NAME[dtype]:
        return array
    with np.errstate(over="ignore"):  # what does not fit becomes infinite and is refused by name
        return array.astype(BY_NAME[dtype])


def _refuse_not_finite(source: _Source, tensor: str, dtype: str) -> None:
    ref = source.refs[tensor]
    converted = "" if ref.dtype == dtype else f" after conversion from {ref.dtype} to {dtype}"
    raise CheckpointError(
        f"{ref.path}: tensor {ref.file_tensor} of tenant {source.name!r} holds NaN or infinite "
        f"values{converted}; "
        "fix the checkpoint" + (", or build with --dtype float32" if converted else "")
    )


def _store_experts(
    objects: Objects,
    sources: Sequence[_Source],
    dtype: str,
    old: Distances | None,
    progress: Progress,
) -> np.ndarray:
    """Store all expert tensors and measure distances. Returns float64 [pairs, layers, experts]."""
    family, config = sources[0].family, sources[0].config
    spec = config.experts
    pairs = tenant_pairs(len(sources))
    matrix = np.zeros((len(pairs), spec.num_layers, spec.num_experts), dtype=np.float64)
    new_pairs = []
    for i, (a, b) in enumerate(pairs):
        if old is not None and sources[a].name in old.tenants and sources[b].name in old.tenants:
            matrix[i] = old.matrix[
                old.pairs.index(
                    (old.tenants.index(sources[a].name), old.tenants.index(sources[b].name))
                )
            ]
        else:
            new_pairs.append(i)
    if not new_pairs and all(s.ids for s in sources):
        return matrix
    squared = np.zeros((len(new_pairs), spec.num_layers, spec.num_experts), dtype=np.float64)
    compared = [pairs[i] for i in new_pairs]

    def one(job: tuple[int, int, str, str]) -> tuple[int, int, np.ndarray, list[str]]:
        layer, expert, _, tensor = job
        arrays = [_read(objects, s, tensor, dtype) for s in sources]
        part, finite = compare(arrays, compared)
        for tenant in np.flatnonzero(~finite):
            _refuse_not_finite(sources[int(tenant)], tensor, dtype)
        ids = [
            s.ids.get(tensor) or objects.put(array)
            for s, array in zip(sources, arrays, strict=True)
        ]
        return layer, expert, part, ids

    jobs = list(family.iter_expert_tensors(config))
    tensor_bytes = max(int(np.prod(shape)) for _, shape in spec.projections) * 4
    with (
        ThreadPoolExecutor(_workers(len(sources) * tensor_bytes)) as pool,
        progress("comparing and storing experts", len(jobs)) as advance,
    ):
        for job, (layer, expert, part, ids) in zip(jobs, pool.map(one, jobs), strict=True):
            squared[:, layer, expert] += part
            for source, object_id in zip(sources, ids, strict=True):
                source.ids[job[3]] = object_id
            advance()
    matrix[new_pairs] = np.sqrt(squared)
    return matrix


def _store_non_experts(
    objects: Objects, sources: Sequence[_Source], dtype: str, progress: Progress
) -> None:
    jobs = [
        (s, tensor)
        for s in sources
        for tensor in s.family.non_expert_shapes(s.config)
        if tensor not in s.ids
    ]
    if not jobs:
        return

    def one(job: tuple[_Source, str]) -> str:
        source, tensor = job
        array = _convert(source, tensor, dtype)
        if not compare([array], [])[1][0]:
            _refuse_not_finite(source, tensor, dtype)
        return objects.put(array)

    largest = max(s.refs[t].nbytes for s, t in jobs) * 2
    with (
        ThreadPoolExecutor(_workers(largest)) as pool,
        progress("storing non-expert weights", len(jobs)) as advance,
    ):
        for (source, tensor), object_id in zip(jobs, pool.map(one, jobs), strict=True):
            source.ids[tensor] = object_id
            advance()


def _workers(bytes_each: int) -> int:
    return max(1, min(4, os.cpu_count() or 1, IN_FLIGHT_BYTES // max(1, bytes_each)))


def _contents(sources: Sequence[_Source]) -> np.ndarray:
    """int64 [tenants, layers, experts]: equal numbers where experts are bit for bit the same."""
    family, spec = sources[0].family, sources[0].config.experts
    numbers: dict[tuple[str, ...], int] = {}
    contents = np.zeros((len(sources), spec.num_layers, spec.num_experts), dtype=np.int64)
    for t, source in enumerate(sources):
        for layer in range(spec.num_layers):
            for expert in range(spec.num_experts):
                key = tuple(
                    source.ids[family.expert_tensor(source.config, layer, expert, p)]
                    for p, _ in spec.projections
                )
                contents[t, layer, expert] = numbers.setdefault(key, len(numbers))
    return contents


def _object_entries(sources: Sequence[_Source], dtype: str) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for source in sources:
        shapes = source.family.all_shapes(source.config)
        for tensor, object_id in source.ids.items():
            shape = shapes[tensor]
            nbytes = int(np.prod(shape, dtype=np.int64)) * BY_NAME[dtype].itemsize
            entries[object_id] = {"dtype": dtype, "shape": list(shape), "bytes": nbytes}
    return entries


def _notes(source: _Source, dtype: str) -> tuple[str, ...]:
    """What was converted on the way in, so that it is said and not only done."""
    if source.notes:
        return source.notes
    counts: dict[str, int] = {}
    for ref in source.refs.values():
        if ref.dtype != dtype:
            counts[ref.dtype] = counts.get(ref.dtype, 0) + 1
    notes = list(source.read_notes)
    for found, count in sorted(counts.items()):
        loss = "without loss" if is_lossless(found, dtype) else "rounded"
        notes.append(f"{count} tensors converted from {found} to {dtype} ({loss})")
    for note in notes:
        logger.info("tenant %s: %s", source.name, note)
    return tuple(notes)


@contextmanager
def _new_or_existing(path: Path) -> Iterator[Path]:
    """The directory to write into: the store itself, or one beside it that becomes the store when
    the block ends well.

    If the block fails, files that it added to an existing store are removed, and so is the
    directory of a new one.
    """
    try:
        if is_store(path):
            with exclusive(path):
                try:
                    yield path
                except BaseException:
                    # A store whose manifest is damaged is left alone: what its files are for is not
                    # known.
                    with suppress(StoreError):
                        _sweep(path, Manifest.read(path))
                    raise
            return
        place = path.resolve()  # the directory itself, where a symbolic link leads to it
        if place == Path.cwd():
            raise StoreError(
                f"{path}: the directory you are in cannot become a store; name one in it, such as "
                "./store"
            )
        staging = place.with_name(f".{place.name}.building")
        staging.mkdir(parents=True, exist_ok=True)
        with exclusive(staging):
            for leftover in staging.iterdir():  # of a build that was killed: its lock is free
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK_FILE:
                    leftover.unlink()
            try:
                yield staging
                os.replace(staging, place)
                fsync(place.parent)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error}; free some space or choose another place"
        ) from error


def _commit(directory: Path, manifest: Manifest) -> None:
    for folder in sorted((directory / "objects").glob("*")):
        fsync(folder)
    manifest.write(directory)
    _sweep(directory, manifest)


def _sweep(directory: Path, manifest: Manifest) -> None:
    """Remove what the manifest does not refer to."""
    Objects(directory / "objects").sweep(set(manifest.objects))
    folders = {t.assets_folder for t in manifest.tenants}
    for folder in (directory / "assets").glob("*"):
        if folder.name not in folders:
            shutil.rmtree(folder)
    for partial in directory.glob("*.partial"):
        partial.unlink()
