"""Damaged stores: what is wrong is found, never built upon, and mended by building again."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import (
    CheckpointError,
    Store,
    StoreError,
    add_tenant,
    remove_tenant,
)
from common.build.build import replan
from tests import helpers
from tests.common.conftest import Family
from tests.common.unfit import EXPERTS, poisoned
from tests.helpers import build_round_robin, flip, rest_slow


@pytest.mark.parametrize("seed", rest_slow(range(25), 5))
def test_a_flipped_bit_anywhere_is_found(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    files = [p for p in sorted(store.path.rglob("*")) if p.is_file() and p.name != ".lock"]
    # Few of many files are not objects: pick them as often.
    others = [p for p in files if p.parent.name != "objects"]
    path = rng.choice(rng.choice([files, others]))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    if path.name.startswith("index-"):
        with pytest.raises(StoreError, match=f"{path}: damaged"):
            Store.open(store.path)
    elif path.name == "store.json":
        # A flip between two kinds of white space changes no value; every other one is refused.
        try:
            found = Store.open(store.path).manifest.to_json()
        except StoreError as error:
            assert str(path) in str(error)
        else:
            assert found == store.manifest.to_json()
    else:
        assert {p.file for p in Store.open(store.path).verify()} == {path}


def test_missing_and_truncated_files_are_named(store: Store) -> None:
    tensor = "model.layers.0.self_attn.o_proj.weight"
    object_id = store.tenant("ana").tensors[tensor]
    path = store.objects.path(object_id)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    (problem,) = store.verify()
    assert problem.file == path and "truncated" in problem.what
    assert f"ana: {tensor}" in store.owners_of(problem.object_ids)
    assert store.owners_of([object_id]) == [f"ana: {tensor}"]
    path.unlink()
    (problem,) = store.verify()
    assert problem.file == path and "missing" in problem.what
    # Building again mends it, although its other objects are taken as they are.
    data = {n: Path(store.tenant(n).source) for n in store.tenants}  # type: ignore[assignment]
    assert build_round_robin(store.path, data, slots=5).verify() == []  # type: ignore[arg-type]


def test_building_again_mends_a_damaged_object(store: Store, family: Family) -> None:
    flip(store, store.tenant("ana").tensors["model.norm.weight"])
    assert build_round_robin(store.path, family.paths, slots=5).verify() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"not a store, there is no store\.json.*moetel build"),
        ("{", r"store\.json: damaged"),
        ('{"format": "other"}', r"not the manifest of a Moetel store"),
        (
            '{"format": "moetel-store", "version": 99}',
            r"format version 99, this code reads versions 1 to 4",
        ),
        ('{"format": "moetel-store", "version": 1}', r"its checksum does not match"),
    ],
)
def test_what_is_not_a_store_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "store.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="no such directory"):
        Store.open(tmp_path / "nothing")


def test_a_damaged_store_is_mended_by_building_again(
    store: Store, family: Family, tmp_path: Path
) -> None:
    manifest = store.path / "store.json"
    manifest.write_bytes(manifest.read_bytes()[:1000])
    before = helpers.fingerprint(store.path)
    with pytest.raises(CheckpointError, match="NaN"):
        build_round_robin(store.path, {"b": poisoned(family, tmp_path, EXPERTS, float("nan"))})
    assert set(before) <= set(helpers.fingerprint(store.path))
    assert build_round_robin(store.path, family.paths, slots=5).verify() == []


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_change_never_takes_a_damaged_asset_for_sound(
    damage: str, store: Store, family: Family
) -> None:
    path = store.assets_dir("ana") / "generation_config.json"
    if damage == "flipped":
        path.write_bytes(path.read_bytes().replace(b"2", b"3", 1))
    else:
        path.unlink()
    before = helpers.fingerprint(store.path)
    for change in (
        lambda: add_tenant(store.path, "more", family.paths["ana"]),
        lambda: remove_tenant(store.path, "bob"),
    ):
        with pytest.raises(
            StoreError, match=r"generation_config\.json: (content|cannot).*build the store again"
        ):
            change()
        assert helpers.fingerprint(store.path) == before
    assert [p.file for p in Store.open(store.path).verify()] == [path]
    assert build_round_robin(store.path, family.paths, slots=5).verify() == []


def test_a_damaged_expert_is_never_compared(store: Store, family: Family, tmp_path: Path) -> None:
    """Its distances would be kept, and the plan made by them, with nothing wrong to be seen."""
    tensor = store.family.expert_tensor(store.config("ana"), 1, 2, "down")
    damaged = store.tenant("ana").tensors[tensor]
    path = flip(store, damaged)
    before = helpers.fingerprint(store.path)
    changes: list[Callable[[], Any]] = [
        lambda: add_tenant(store.path, "more", family.paths["bob"]),
        lambda: replan(
            store.path, policy="mean", slots=8
        ),  # whose merged copies would be made of it
    ]
    for change in changes:
        with pytest.raises(
            StoreError,
            match=rf"{path}: tensor {damaged} does not match its checksum; `moetel verify ",
        ):
            change()
        assert helpers.fingerprint(store.path) == before
    assert [p.file for p in Store.open(store.path).verify()] == [path]
    # Without the tenant whose it is, all is well again.
    assert remove_tenant(store.path, "ana").verify() == []
    assert add_tenant(store.path, "ana", family.paths["ana"]).verify() == []


def test_damaged_distances_are_never_planned_with(store: Store) -> None:
    kept = store.manifest.similarity["object"]
    flip(store, kept)
    before = helpers.fingerprint(store.path)
    with pytest.raises(StoreError, match=rf"{kept} does not match its checksum"):
        remove_tenant(store.path, "bob")
    assert helpers.fingerprint(store.path) == before
