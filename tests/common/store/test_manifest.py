"""The manifest: older formats of it are read as they were meant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common import Store, remove_tenant
from common.plan.residual import LOW_RANK, SIGN, Part
from common.store.change import set_plan
from tests import helpers
from tests.common.conftest import Family
from tests.common.older_stores import write_older


@pytest.mark.parametrize("version", [2, 3])
def test_stores_of_older_versions_are_read_and_changed(
    version: int, family: Family, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    store = helpers.build_round_robin(path, family.paths)
    plan, means = helpers.with_merged(store, range(0, store.plan.num_slots, 2))
    parts = [Part("gate", SIGN, 1, 4), Part("up", SIGN, 1, 8), Part("down", LOW_RANK, 8, 2)]
    shapes = dict(store.experts.projections)
    plan, records = helpers.with_residuals(plan, shapes, lambda t, layer, e: parts[: 1 + t])
    store = set_plan(path, plan, merged=means, records=records)
    expected = {n: store.served_expert(n, 1, 2) for n in store.tenants}
    write_older(store, version)
    again = Store.open(path)
    assert again.verify() == [] and again.plan.residuals == store.plan.residuals
    assert again.manifest.merged == store.manifest.merged
    for name, matrices in expected.items():
        found = again.served_expert(name, 1, 2)
        assert all(np.array_equal(found[p], matrices[p]) for p in matrices)
    # A change writes today's version, and leaves what is there in its files.
    changed = remove_tenant(path, store.tenants[-1], keep_plan=True)
    assert json.loads((path / "store.json").read_text())["version"] == 4
    assert changed.verify() == []
    names = {changed.objects.path(i).stem for i in changed.manifest.objects}
    assert set(changed.manifest.objects) & names  # single files of before
    assert changed.objects.unreferenced(changed.manifest.objects) == []
    for name in changed.tenants:
        found = changed.served_expert(name, 1, 2)
        assert all(np.array_equal(found[p], expected[name][p]) for p in found)
