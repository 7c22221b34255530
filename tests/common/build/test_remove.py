"""Tenants that leave without a new plan: what others are served stays bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common import (
    Store,
    build_store,
    extend_store,
    remove_tenant,
)
from common.build.beside import BESIDE
from common.plan.plan import MERGED, MISS
from common.store.change import set_plan
from tests.common.conftest import Family
from tests.helpers import rest_slow
from tests.served import check, equal, own, served, squared


@pytest.mark.parametrize("name", rest_slow(["base", "ana", "bob"]))
def test_a_tenant_leaves_any_plan(name: str, store: Store) -> None:
    stay = [t for t in store.tenants if t != name]
    before = {n: served(store, n) for n in stay}
    gone = store.tenants.index(name)
    rest = [t for t in range(3) if t != gone]
    kept = sorted(set(store.plan.serving[rest].reshape(-1).tolist()) - {MISS})
    contents = [store.slot_content(slot) for slot in kept]
    places = [(store.plan.copies[s].layer, store.plan.copies[s].expert) for s in kept]
    owners = [store.plan.copies[s].owner for s in kept]
    distances = store.distances.matrix[store.distances.pairs.index((rest[0], rest[1]))]
    shrunk = remove_tenant(store.path, name, keep_plan=True)
    check(shrunk)
    assert shrunk.tenants == shrunk.plan.tenants == tuple(stay)
    for n, weights in before.items():
        assert equal(served(shrunk, n), weights)
    assert [shrunk.slot_content(i) for i in range(shrunk.plan.num_slots)] == contents
    assert [(c.layer, c.expert) for c in shrunk.plan.copies] == places
    for old, at in zip(owners, shrunk.plan.copies, strict=True):
        assert at.owner == (MERGED if old in (MERGED, gone) else rest.index(old))
        assert at.mix == () or (len(at.mix) == 2 and sum(at.mix) == pytest.approx(1))
    assert np.array_equal(shrunk.plan.serving == MISS, store.plan.serving[rest] == MISS)
    assert len(shrunk.plan.residuals) == sum(r.tenant != gone for r in store.plan.residuals)
    assert np.array_equal(shrunk.distances.matrix[0], distances)
    assert shrunk.manifest.provenance[BESIDE] == {"added": [], "removed": [name]}
    if store.manifest.prediction is not None:
        losses = store.manifest.prediction["losses"]
        assert shrunk.manifest.prediction is not None
        assert shrunk.manifest.prediction["losses"] == [losses[t] for t in rest]
        assert shrunk.manifest.prediction["bound"] is None


def test_copies_that_serve_nobody_are_dropped(family: Family, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", family.paths, slots="all")
    assert store.plan.num_slots == 24
    shrunk = remove_tenant(store.path, "ana", keep_plan=True)
    assert shrunk.plan.num_slots == 16 and not shrunk.manifest.merged
    # The last user of a position takes its copy along, and a newcomer misses there.
    serving = shrunk.plan.serving.copy()
    serving[0, 1, 3] = MISS
    set_plan(store.path, replace(shrunk.plan, serving=serving))
    serving[1] = MISS
    alone = replace(shrunk.plan, serving=serving)
    set_plan(store.path, alone)
    rest = remove_tenant(store.path, "bob", keep_plan=True)
    assert rest.plan.num_slots == 7
    grown = extend_store(store.path, "bob", family.paths["bob"])
    assert (grown.plan.serving[1] == MISS).sum() == 1 and grown.plan.serving[1, 1, 3] == MISS
    check(grown)


def test_what_was_removed_comes_back_without_loss(family: Family, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", family.paths, policy="round_robin")
    owned = store.plan.owner == 0
    remove_tenant(store.path, "base", keep_plan=True)
    back = extend_store(store.path, "base", family.paths["base"])
    check(back)
    assert back.tenants == ("ana", "bob", "base")
    # Its own copies stayed, and it is served by them; a copy without an owner is no merged one that
    # anyone sees.
    assert np.array_equal(back.plan.serving[2], store.plan.serving[0])
    same = np.array(
        [
            squared([a], [b]) == 0
            for a, b in zip(own(back, "base"), served(back, "base"), strict=True)
        ]
    )
    assert np.array_equal(same.reshape(owned.shape), owned)
    assert np.array_equal(back.plan.owner == MERGED, owned)
    assert back.manifest.provenance[BESIDE] == {"added": ["base"], "removed": ["base"]}
    assert remove_tenant(store.path, "base", keep_plan=True).manifest.provenance[BESIDE] == {
        "added": [],
        "removed": ["base"],
    }


def test_coming_and_going_leaves_no_trace(store: Store, newcomer: Path) -> None:
    before = store.manifest.to_json()
    extend_store(store.path, "cy", newcomer, extra=0.1)
    after = remove_tenant(store.path, "cy", keep_plan=True).manifest.to_json()
    if before["prediction"] is not None:
        before["prediction"]["bound"] = None
    # Keys sorted, as the manifest's checksum reads them.
    assert json.dumps(after, sort_keys=True) == json.dumps(before, sort_keys=True)
