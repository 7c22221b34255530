"""Stores that hold only what serving needs, and what the parts of a store take on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.errors import StoreError
from common.plan.plan import MERGED, MISS
from common.progress import Progress, silent
from common.store.change import commit, new_or_existing
from common.store.manifest import NONE, Manifest
from common.store.objects import Objects
from common.store.store import Store


def pack_store(store: Store, target: str | Path, progress: Progress = silent) -> Store:
    """Write a store that serves the same and holds nothing else.

    Resident copies, residuals, tenants' other weights and files, and own experts that can be missed
    go along. It cannot be planned anew, and takes no more tenants. Nothing of it lies elsewhere.
    Raises StoreError for a target that exists, or a damaged object.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: exists and is not an empty directory; name another one")
    manifest = for_serving(store.manifest)
    wanted = list(dict.fromkeys(manifest.object_ids()))
    with new_or_existing(target) as directory:
        objects = Objects(directory / "objects", {})
        with progress("packing", len(wanted)) as advance:
            for object_id in wanted:
                objects.put(store.objects.read(store.objects.ref(object_id)))
                advance()
        for folder in {tenant.assets_folder for tenant in manifest.tenants}:
            shutil.copytree(store.path / "assets" / folder, directory / "assets" / folder)
        commit(objects, manifest)
    return Store.open(target)


def for_serving(manifest: Manifest) -> Manifest:
    """The manifest without what only planning needs."""
    tenants = []
    for number, tenant in enumerate(manifest.tenants):
        kept = set(manifest.family.non_expert_shapes(tenant.config))
        kept.update(_served_from(manifest, number))
        tensors = {name: i for name, i in tenant.tensors.items() if name in kept}
        tenants.append(replace(tenant, tensors=tensors, adapted=()))
    return replace(
        manifest,
        tenants=tuple(tenants),
        calibration={},
        measurements=None,
        similarity={**manifest.similarity, "object": None},
        own_experts=NONE,
    )


def _served_from(manifest: Manifest, tenant: int) -> Iterator[str]:
    """Names of a tenant's own experts that are resident copies, or that it can miss."""
    plan, config = manifest.plan, manifest.tenants[tenant].config
    places = {(c.layer, c.expert) for c in plan.copies if c.owner == tenant}
    places |= {(layer, e) for layer, e in np.argwhere(plan.serving[tenant] == MISS).tolist()}
    for layer, expert in sorted(places):
        for projection, _ in config.experts.projections:
            yield manifest.family.expert_tensor(config, layer, expert, projection)


def bytes_by_part(store: Store) -> dict[str, int]:
    """Bytes of files by what they are for; what serves several parts counts with the first."""
    manifest = store.manifest
    seen: set[str] = set()

    def count(ids: Iterable[str], in_store: bool = True) -> int:
        new = {i for i in ids if manifest.objects[i].in_store == in_store} - seen
        seen.update(new)
        return sum(manifest.objects[i].nbytes for i in new)

    owned: list[str] = []
    for number, tenant in enumerate(manifest.tenants):
        places = [(c.layer, c.expert) for c in store.plan.copies if c.owner == number]
        for layer, expert in places:
            owned += store.own_content(tenant.name, layer, expert)
    merged = [
        i
        for slot, copy in enumerate(store.plan.copies)
        if copy.owner == MERGED
        for i in manifest.merged[slot].values()
    ]
    others = [
        tenant.tensors[name]
        for tenant in manifest.tenants
        for name in manifest.family.non_expert_shapes(tenant.config)
    ]
    everything = [i for tenant in manifest.tenants for i in tenant.tensors.values()]
    return {
        "resident copies": count([*owned, *merged]),
        "residuals": count(manifest.residuals),
        "tenants' other weights": count(others),
        "own experts that are not resident": count(everything),
        "what was measured for planning": count(manifest.measured_ids()),
        "experts left in checkpoints": count(everything, in_store=False),
    }
