"""Build a store, add a tenant, remove one.

Every tensor is read once: the same pass checks that it is finite, converts it to the store's type,
measures its distance to the other tenants', hashes it and writes it. A store changes in one step,
the replacement of store.json; a new store appears in one step, the renaming of its directory. A
process killed before that step leaves things as they were, plus files that nothing refers to, which
the next write removes, and what it measured, which the next write uses if it asks for the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.build.assemble import assemble
from common.build.beside import leave
from common.build.draft import make_draft
from common.build.examples import CalibrationSet
from common.build.settings import PlanSettings, Slots, resolve
from common.build.sources import (
    Source,
    check_agreement,
    check_tenants,
    narrowest_type,
    open_tenants,
    with_tenant,
)
from common.errors import StoreError, UnknownTenantError
from common.plan.profile import Profile
from common.planning.measurements import Measurements
from common.planning.policies import DEFAULT_POLICY, policy_named
from common.progress import Progress, silent
from common.store.change import commit, known_objects, new_or_existing
from common.store.manifest import COPY, OWN_EXPERTS, Manifest
from common.store.objects import Objects, check_dtype
from common.store.profiles import load_profile
from common.store.store import Store, is_store

logger = logging.getLogger(__name__)


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
    own_experts: str = COPY,
    bases: Mapping[str, str | Path] | None = None,
    progress: Progress = silent,
) -> Store:
    """Build a store from checkpoints, replacing the store at `path` if there is one.

    Of `slots`, `budget_bytes` and `extra` at most one is given. Without any there is one copy a
    position and, if the policy can use it, `DEFAULT_EXTRA` for each tenant.

    Args:
        tenants: name -> checkpoint directory, in the order that the plan counts them.
        policy: a name of `POLICIES` in common/planning/policies.py; docs/consolidation.md compares
            them.
        slots: resident copies, nothing beside them; "all" shares nothing but identical experts.
        budget_bytes: device bytes for copies, residuals and one tenant's non-expert weights, in the
            store's type.
        extra: bytes beyond one copy a position, as a share of one model's expert bytes.
        calibration: tenant -> examples of its use, measured with the family's engine before
            planning, and kept.
        traffic: tenant -> how many requests it has where a tenant that is not named has one.
        dtype: the store's type; auto is that of all tensors of all tenants if they agree, else
            float32, so that nothing is rounded.
        configs: tenant -> config.json, for T5X and Orbax checkpoints, which hold none.
        own_experts: copy puts every tenant's experts into the store. reference leaves them in their
            checkpoints, where their types allow it; what it refers to is checked when it is used.
            none drops those that are not resident once the plan is made, so that the store can
            neither miss, nor be planned anew, nor take more tenants.
        bases: tenant -> base, for PEFT adapters; else the base is the one that the adapter names.

    Raises CheckpointError, PlanError or StoreError; what was at `path` is then as it was.
    """
    path = Path(path)
    if own_experts not in OWN_EXPERTS:
        raise StoreError(f"own_experts is {own_experts!r}; give one of {', '.join(OWN_EXPERTS)}")
    settings = PlanSettings(policy, slots, budget_bytes, extra, dict(traffic or {}))
    settings.check()
    pairs = list(tenants.items()) if isinstance(tenants, Mapping) else list(tenants)
    configs, bases = configs or {}, bases or {}
    check_tenants(
        [name for name, _ in pairs],
        {
            "a config": configs,
            "a base": bases,
            "calibration": calibration or {},
            "traffic": traffic or {},
        },
    )
    sources = open_tenants(pairs, configs, bases)
    check_agreement(sources)
    if dtype == "auto":
        dtype = narrowest_type(sources)
    check_dtype(dtype)
    amount = resolve(settings, sources, dtype)
    if path.exists() and not is_store(path) and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(
            f"{path}: exists and is not a store; name another place, or remove it first"
        )
    with new_or_existing(path) as directory:
        objects = Objects(directory / "objects", known_objects(directory))
        manifest = assemble(
            objects,
            sources,
            settings,
            amount,
            dtype,
            own_experts,
            None,
            {},
            calibration or {},
            progress,
        )
        commit(objects, manifest)
    return Store.open(path)


def add_tenant(
    path: str | Path,
    name: str,
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    base: str | Path | None = None,
    calibration: CalibrationSet | None = None,
    progress: Progress = silent,
) -> Store:
    """Add a tenant and plan again with the settings that the store was built with; `extend_store`
    keeps the plan.

    Args:
        config: config.json of a T5X or Orbax checkpoint, which holds none.
        base: of a PEFT adapter; else the one that the adapter names.
        calibration: examples of the new tenant's use.

    Raises CheckpointError, PlanError or StoreError; the store is then as it was.
    """
    examples = {} if calibration is None else {name: calibration}
    return _change(Path(path), with_tenant(name, checkpoint, config, base), examples, progress)


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
    old = PlanSettings.from_json(Store.open(path).manifest.provenance["settings"])
    if slots is None and budget_bytes is None and extra is None:
        slots, budget_bytes, extra = old.slots, old.budget_bytes, old.extra
        if policy is not None and not policy_named(policy).uses_extra:
            extra = None
    settings = PlanSettings(
        policy or old.policy,
        slots,
        budget_bytes,
        extra,
        old.traffic if traffic is None else traffic,
    )
    settings.check()

    def the_same(store: Store) -> list[Source]:
        return [Source.from_store(store, t) for t in store.tenants]

    return _change(Path(path), the_same, calibration or {}, progress, settings, known)


def remove_tenant(
    path: str | Path, name: str, *, keep_plan: bool = False, progress: Progress = silent
) -> Store:
    """Remove a tenant, free what only it used, and plan again.

    With `keep_plan` what other tenants are served stays bit for bit. Copies that serve none of them
    are dropped, and slots are numbered anew in the same order.

    Raises UnknownTenantError, StoreError; the store is then as it was.
    """

    def without_it(store: Store) -> list[Source]:
        if name not in store.tenants:
            raise UnknownTenantError(name, store.tenants)
        if len(store.tenants) == 1:
            raise StoreError(
                f"tenant {name!r} is the only one in this store; delete the directory {store.path} "
                "instead"
            )
        return [Source.from_store(store, t) for t in store.tenants if t != name]

    if keep_plan:
        return change_beside(
            Path(path), without_it, lambda old, draft, put: leave(old, draft, name), progress
        )
    return _change(Path(path), without_it, {}, progress)


def _change(
    path: Path,
    edit: Callable[[Store], list[Source]],
    calibration: Mapping[str, CalibrationSet | Profile],
    progress: Progress,
    settings: PlanSettings | None = None,
    known: Measurements | None = None,
) -> Store:
    """Give a store the tenants that `edit` makes of it, planned with its own settings or others.

    known: what planning measured; what the store keeps if not given.
    """
    Store.open(path)  # raises if there is none; what holds is read below, under the lock
    with new_or_existing(path) as directory:
        store = Store.open(directory)
        sources = edit(store)
        names = [s.name for s in sources]
        strangers = sorted(set(calibration) - set(names))
        if strangers:
            raise UnknownTenantError(strangers[0], tuple(names))
        if settings is None:
            settings = PlanSettings.from_json(store.manifest.provenance["settings"])
            settings = replace(
                settings, traffic={k: v for k, v in settings.traffic.items() if k in names}
            )
        amount = resolve(settings, sources, store.dtype)
        profiles = {
            name: p for name in names if name in store.tenants and (p := load_profile(store, name))
        }
        manifest = assemble(
            store.objects,
            sources,
            settings,
            amount,
            store.dtype,
            store.manifest.own_experts,
            store.distances,
            profiles,
            calibration,
            progress,
            known or Measurements.from_store(store),
        )
        commit(store.objects, manifest)
    return Store.open(path)


def change_beside(
    path: Path,
    edit: Callable[[Store], list[Source]],
    change: Callable[[Store, Store, Callable[[np.ndarray], str]], Manifest],
    progress: Progress,
) -> Store:
    """Give a store the tenants that `edit` makes of it, and the plan that `change` makes of the one
    it has.

    change: (the store before, one with all tensors of the new tenants, what stores an array) -> the
        manifest, its objects left out.
    """
    Store.open(path)
    with new_or_existing(path) as directory:
        old = Store.open(directory)
        draft = make_draft(
            directory,
            edit(old),
            old.dtype,
            old.distances,
            old.manifest.provenance,
            progress,
            old.objects,
            old.manifest.own_experts,
        )
        commit(old.objects, change(old, draft, old.objects.put))
    return Store.open(path)
