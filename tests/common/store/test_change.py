"""Changes of a store: one writer at a time, all of a change or nothing of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    CheckpointError,
    Store,
    StoreError,
    UnknownTenantError,
    add_tenant,
    remove_tenant,
)
from common.checkpoints import TensorRef
from common.store.lock import exclusive
from tests import checkpoints, helpers
from tests.common.conftest import Family
from tests.common.unfit import EXPERTS, other, poisoned
from tests.helpers import build_round_robin


def test_adding_and_removing_equals_building(family: Family, tmp_path: Path) -> None:
    names = family.names
    fresh = build_round_robin(tmp_path / "fresh", family.paths, slots=6)
    path = tmp_path / "grown"
    build_round_robin(path, {n: family.paths[n] for n in names[:2]}, slots=6)
    grown = add_tenant(path, names[2], family.paths[names[2]])
    assert grown.plan == fresh.plan
    assert np.array_equal(grown.distances.matrix, fresh.distances.matrix)
    assert set(grown.manifest.objects) == set(fresh.manifest.objects)
    shrunk = remove_tenant(path, names[0])
    rebuilt = build_round_robin(
        tmp_path / "rebuilt", {n: family.paths[n] for n in names[1:]}, slots=6
    )
    assert shrunk.plan == rebuilt.plan
    assert set(shrunk.manifest.objects) == set(rebuilt.manifest.objects)
    assert shrunk.verify() == [] and not shrunk.objects.unreferenced(shrunk.manifest.objects)
    assert shrunk.verify() == []


def test_a_store_can_be_replaced(family: Family, tmp_path: Path) -> None:
    build_round_robin(tmp_path / "store", family.paths, slots=3)
    store = build_round_robin(tmp_path / "store", {"ana": family.paths["ana"]}, slots=2)
    assert store.tenants == ("ana",) and store.verify() == []
    assert store.objects.unreferenced(set(store.manifest.objects)) == []


def test_refused_changes_leave_the_store_as_it_was(
    store: Store, family: Family, tmp_path: Path
) -> None:
    before = helpers.fingerprint(store.path)
    bad = [
        (
            lambda: add_tenant(store.path, "ana", family.paths["ana"]),
            StoreError,
            "'ana' is in this store already",
        ),
        (lambda: add_tenant(store.path, "../x", family.paths["ana"]), StoreError, "is not allowed"),
        (
            lambda: add_tenant(store.path, "x", other(tmp_path, num_local_experts=3)),
            StoreError,
            "cannot share experts",
        ),
        (
            lambda: add_tenant(store.path, "x", poisoned(family, tmp_path, EXPERTS, float("nan"))),
            CheckpointError,
            "NaN",
        ),
        (lambda: remove_tenant(store.path, "nobody"), UnknownTenantError, "no tenant 'nobody'"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            change()
        assert helpers.fingerprint(store.path) == before
    remove_tenant(store.path, "ana")
    remove_tenant(store.path, "bob")
    with pytest.raises(StoreError, match=r"'base' is the only one.*delete the directory"):
        remove_tenant(store.path, "base")


def test_two_writers_at_once_are_refused(store: Store, family: Family, tmp_path: Path) -> None:
    before = helpers.fingerprint(store.path)
    with (
        exclusive(store.path),
        pytest.raises(StoreError, match="another process is writing this store; wait"),
    ):
        build_round_robin(store.path, family.paths)
    assert helpers.fingerprint(store.path) == before
    staging = tmp_path / ".new.building"
    staging.mkdir()
    with exclusive(staging), pytest.raises(StoreError, match="another process is writing"):
        build_round_robin(tmp_path / "new", family.paths)
    build_round_robin(tmp_path / "new", family.paths)
    assert not staging.exists()


def test_a_change_starts_from_what_it_finds_under_the_lock(
    store: Store, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store.open

    def open_then_overtaken(path: Path) -> Store:
        found = opened(path)
        monkeypatch.undo()
        remove_tenant(path, "bob")
        return found

    monkeypatch.setattr(Store, "open", open_then_overtaken)
    assert remove_tenant(store.path, "ana").tenants == ("base",)
    assert Store.open(store.path).verify() == []


def test_leftovers_are_reported_and_swept(store: Store, family: Family) -> None:
    folder = store.path / "objects" / "ab"
    folder.mkdir(exist_ok=True)
    (folder / "0123.partial").write_bytes(b"half")
    (store.path / "assets" / "orphan").mkdir()
    assert [p.name for p in store.objects.unreferenced(set(store.manifest.objects))] == [
        "0123.partial"
    ]
    assert store.verify() == []
    again = build_round_robin(store.path, family.paths)
    assert again.objects.unreferenced(set(again.manifest.objects)) == []
    assert not (store.path / "assets" / "orphan").exists()


def test_every_source_tensor_is_read_once(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[Path, str]] = []
    read = TensorRef.read

    def counted(self: TensorRef) -> np.ndarray:
        if tmp_path not in self.path.parents:  # a checkpoint's, not the store's own
            reads.append((self.path, self.file_tensor))
        return read(self)

    monkeypatch.setattr(TensorRef, "read", counted)
    store = build_round_robin(tmp_path / "store", {n: family.paths[n] for n in family.names[:2]})
    tensors = len(store.tenant("base").tensors)
    assert len(reads) == len(set(reads)) == 2 * tensors
    add_tenant(store.path, "bob", family.paths["bob"])
    assert len(reads) == len(set(reads)) == 3 * tensors


def test_a_tenant_joins_in_the_stores_type(family: Family, tmp_path: Path) -> None:
    half = checkpoints.save(family.models[0].to("bfloat16"), tmp_path / "half")
    store = build_round_robin(tmp_path / "store", {"half": half})
    grown = add_tenant(store.path, "ana", family.paths["ana"])
    assert grown.dtype == "bfloat16" and grown.tenant("half").notes == ()
    assert "converted from float32 to bfloat16 (rounded)" in grown.tenant("ana").notes[0]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 2,000 bytes: the kernel fails writes as it does on a full disk."""
    if sys.platform == "win32":
        pytest.skip("needs resource limits")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_things_as_they_were(family: Family, tmp_path: Path) -> None:
    two = {n: family.paths[n] for n in ("base", "ana")}
    store = build_round_robin(tmp_path / "store", two)
    before = helpers.fingerprint(tmp_path)
    steps: list[Callable[[], Any]] = [
        lambda: build_round_robin(tmp_path / "new", two),
        lambda: build_round_robin(store.path, family.paths),
        lambda: add_tenant(store.path, "bob", family.paths["bob"]),
        lambda: store.export("ana", tmp_path / "out"),
    ]
    for step in steps:
        with (
            full_disk(),
            pytest.raises(
                StoreError, match=r"cannot be written: .*free some space or choose another"
            ),
        ):
            step()
        assert helpers.fingerprint(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == ["store"]
    assert add_tenant(store.path, "bob", family.paths["bob"]).verify() == []
