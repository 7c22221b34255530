"""The manifest: older formats of it are read as they were meant."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from common import Store
from common.plan.residual import LOW_RANK, SIGN, Part
from common.store.change import set_plan
from tests import helpers
from tests.common.conftest import Family


def test_a_store_that_names_projections_as_files_do_is_read(family: Family, tmp_path: Path) -> None:
    """Format 2: w1, w3 and w2 where roles stand now."""
    path = tmp_path / "store"
    store = helpers.build_round_robin(path, family.paths)
    plan, means = helpers.with_merged(store, range(0, store.plan.num_slots, 2))
    parts = [Part("gate", SIGN, 1, 4), Part("up", SIGN, 1, 8), Part("down", LOW_RANK, 8, 2)]
    shapes = dict(store.experts.projections)
    plan, records = helpers.with_residuals(plan, shapes, lambda t, layer, e: parts[: 1 + t])
    store = set_plan(path, plan, merged=means, records=records)
    older = {"gate": "w1", "up": "w3", "down": "w2"}
    value = json.loads((path / "store.json").read_text())
    del value["checksum"]
    value["version"] = 2
    value["merged"] = {
        slot: {older[p]: i for p, i in ids.items()} for slot, ids in value["merged"].items()
    }
    for residual in value["plan"]["residuals"]:
        for part in residual[3]:
            part[0] = older[part[0]]
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    value["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "store.json").write_text(json.dumps(value))
    again = Store.open(path)
    assert again.plan.residuals == store.plan.residuals
    assert again.manifest.merged == store.manifest.merged
    for name in store.tenants:
        expected, found = (s.served_expert(name, 1, 2) for s in (store, again))
        assert all(np.array_equal(found[p], expected[p]) for p in expected)
