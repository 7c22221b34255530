"""What a store serves a tenant with, position by position, beside what the tenant has."""

from __future__ import annotations

import numpy as np

from common import (
    Store,
)
from common.plan.plan import MISS

Experts = dict[str, np.ndarray]


def served(store: Store, name: str) -> list[Experts]:
    """What answers for a tenant, position by position."""
    spec = store.experts
    return [
        store.served_expert(name, i, e)
        for i in range(spec.num_layers)
        for e in range(spec.num_experts)
    ]


def own(store: Store, name: str) -> list[Experts]:
    spec = store.experts
    return [
        store.own_expert(name, i, e)
        for i in range(spec.num_layers)
        for e in range(spec.num_experts)
    ]


def equal(a: list[Experts], b: list[Experts]) -> bool:
    return all(
        x.keys() == y.keys() and all(np.array_equal(x[p], y[p]) for p in x)
        for x, y in zip(a, b, strict=True)
    )


def squared(a: list[Experts], b: list[Experts]) -> float:
    return float(
        sum(
            ((x[p].astype(np.float64) - y[p]) ** 2).sum()
            for x, y in zip(a, b, strict=True)
            for p in x
        )
    )


def check(store: Store) -> None:
    """What must hold of every store: sound, and no file without a use or use without a file."""
    manifest = store.manifest
    assert store.verify() == []
    assert store.objects.unreferenced(set(manifest.objects)) == []
    used = {i for t in manifest.tenants for i in t.tensors.values()} | set(manifest.residuals)
    used |= {i for ids in manifest.merged.values() for i in ids.values()}
    used |= {i for c in manifest.calibration.values() for i in c["objects"].values()}
    used |= {manifest.similarity["object"]} - {None}
    if manifest.measurements is not None:
        used |= {table["object"] for table in manifest.measurements["tables"].values()}
    assert set(manifest.objects) == used
    folders = {p.name for p in (store.path / "assets").iterdir()}
    assert folders == {t.assets_folder for t in manifest.tenants}


def nearest(store: Store, name: str, layer: int, expert: int) -> int:
    """By going through all resident copies of the position."""
    mine = store.own_expert(name, layer, expert)
    found = []
    for slot, at in enumerate(store.plan.copies):
        if (at.layer, at.expert) == (layer, expert):
            weights = {p: ref.read() for p, ref in store.slot_refs(slot).items()}
            found.append(
                (squared([mine], [{p: w.astype(np.float32) for p, w in weights.items()}]), slot)
            )
    return min(found)[1] if found else MISS
