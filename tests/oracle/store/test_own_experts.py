"""Stores that leave tenants' experts in their checkpoints, drop them, or were packed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    CheckpointError,
    MoetelError,
    PlanError,
    Store,
    StoreError,
    add_tenant,
    build_store,
    load_engine,
    pack_store,
    remove_tenant,
)
from common.build.build import replan
from common.store.pack import bytes_by_part
from tests import helpers
from tests.conftest import Family
from tests.helpers import prompts

ROWS = prompts(0, [9])


def answers(store: Store) -> list[np.ndarray]:
    with load_engine(store, device="cpu") as engine:
        return [engine.logits(name, ROWS) for name in store.tenants]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """But for rounding: where a weight lies in memory may change the order of torch's sums."""
    return all(
        np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True)
    )


def copies_of(family: Family, path: Path) -> dict[str, Path]:
    return {n: Path(shutil.copytree(p, path / n)) for n, p in family.paths.items()}


@pytest.mark.parametrize(
    "options",
    [{"policy": "round_robin", "slots": 3}, {"policy": "residual", "extra": 0.4}],
    ids=str,
)
def test_a_packed_store_serves_the_same(
    family: Family, tmp_path: Path, options: dict[str, Any]
) -> None:
    checkpoints = copies_of(family, tmp_path)
    store = build_store(
        tmp_path / "store", checkpoints, own_experts="reference", dtype="float32", **options
    )
    expected = answers(store)
    packed = pack_store(store, tmp_path / "packed")
    assert packed.verify() == [] and packed.plan == store.plan
    assert packed.objects.unreferenced(packed.manifest.objects) == []
    assert same(answers(packed), expected)
    # It stands alone, and says what it is without.
    for path in checkpoints.values():
        shutil.rmtree(path)
    assert same(answers(packed), expected)
    for change in (
        lambda: replan(packed.path),
        lambda: add_tenant(packed.path, "more", family.paths["ana"]),
        lambda: remove_tenant(packed.path, "ana", keep_plan=True),
        lambda: pack_store(store, packed.path),
    ):
        before = helpers.fingerprint(packed.path)
        with pytest.raises(StoreError, match=r"keeps only what serving needs|not an empty"):
            change()
        assert helpers.fingerprint(packed.path) == before
    if not packed.plan.num_misses:
        with pytest.raises(StoreError, match=r"holds no .*\.weight of tenant 'base'"):
            packed.own_expert("base", 0, 0)


def test_referenced_experts_serve_and_plan_as_copied_ones(family: Family, tmp_path: Path) -> None:
    checkpoints = copies_of(family, tmp_path)
    options: dict[str, Any] = {"policy": "round_robin", "slots": 3}
    copied = build_store(tmp_path / "copied", checkpoints, **options)
    store = build_store(tmp_path / "store", checkpoints, own_experts="reference", **options)
    assert store.plan == copied.plan and store.verify() == []
    parts = bytes_by_part(store)
    expert_bytes = 3 * store.experts.num_positions * store.copy_bytes
    assert parts["experts left in checkpoints"] == expert_bytes
    assert parts["resident copies"] == parts["own experts that are not resident"] == 0
    assert store.describe()["bytes_on_disk"] == copied.describe()["bytes_on_disk"] - expert_bytes
    assert same(answers(store), answers(copied))
    # A change goes on as the build began.
    for name in ("copied", "store"):
        add_tenant(tmp_path / name, "more", family.paths["ana"])
        replan(tmp_path / name, policy="fit", slots=5)
    again, other = Store.open(store.path), Store.open(copied.path)
    assert again.plan == other.plan and again.manifest.own_experts == "reference"
    assert bytes_by_part(again)["experts left in checkpoints"] >= expert_bytes
    assert same(answers(again), answers(other))


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_changed_checkpoint_is_named(family: Family, tmp_path: Path, damage: str) -> None:
    checkpoints = copies_of(family, tmp_path)
    store = build_store(
        tmp_path / "store", checkpoints, policy="round_robin", slots=3, own_experts="reference"
    )
    tenant = int(np.argwhere(store.plan.serving < 0)[0][0])
    file = checkpoints[store.tenants[tenant]] / "model.safetensors"
    layer, expert = (int(i) for i in np.argwhere(store.plan.serving[tenant] < 0)[0])
    if damage == "flipped":
        name = store.family.expert_tensor(store.config("base"), layer, expert, "down")
        assert helpers.flip(store, store.tenant(store.tenants[tenant]).tensors[name]) == file
        what = r"is not as it was when the store was built"
    else:
        file.unlink()
        what = "the file is missing"
    assert {p.file for p in Store.open(store.path).verify()} == {file}

    def use() -> None:
        with load_engine(store.path, device="cpu") as engine:
            for seed in range(20):
                engine.logits(store.tenants[tenant], prompts(seed, [30]))

    with pytest.raises(MoetelError, match=rf"{file}: {what}"):
        use()
    with pytest.raises((StoreError, CheckpointError), match=str(file)):
        replan(store.path, policy="mean", slots=8)


def test_a_checkpoint_that_changes_while_it_is_used_is_named(
    family: Family, tmp_path: Path
) -> None:
    """What is left in a checkpoint is compared once, and again when its file was written."""
    checkpoints = copies_of(family, tmp_path)
    store = build_store(
        tmp_path / "store", checkpoints, policy="round_robin", slots=3, own_experts="reference"
    )
    tenant, layer, expert = (int(i) for i in np.argwhere(store.plan.serving < 0)[0])
    ref = store.copy_refs(store.tenants[tenant], layer, expert)["down"]
    before = store.objects.map(ref).copy()
    np.testing.assert_array_equal(store.objects.map(ref), before)
    helpers.flip(store, ref.file_tensor)
    with pytest.raises(StoreError, match="is not as it was when the store was built"):
        store.objects.map(ref)


def test_dropped_experts(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "store"
    options: dict[str, Any] = {"policy": "residual", "extra": 0.4}
    store = build_store(path, family.paths, own_experts="none", **options)
    kept = build_store(tmp_path / "kept", family.paths, **options)
    assert store.plan == kept.plan and store.verify() == []
    assert bytes_by_part(store)["own experts that are not resident"] == 0
    assert all(entry.in_store for entry in store.manifest.objects.values())
    assert store.describe()["bytes_on_disk"] < 0.7 * kept.describe()["bytes_on_disk"]
    assert same(answers(store), answers(kept))
    with pytest.raises(PlanError, match="would be missed, and --own-experts none keeps none"):
        build_store(path, family.paths, own_experts="none", policy="round_robin", slots=3)
    with pytest.raises(StoreError, match="own_experts is 'some'; give one of copy, reference"):
        build_store(path, family.paths, own_experts="some")
    assert Store.open(path).plan == store.plan


def test_types_that_must_change_are_copied(family: Family, tmp_path: Path) -> None:
    store = build_store(
        tmp_path / "store", family.paths, own_experts="reference", dtype="bfloat16", slots="all"
    )
    assert all(entry.in_store for entry in store.manifest.objects.values())
    assert store.verify() == []
