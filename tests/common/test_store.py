"""Stores: what they keep, share and refuse; damage is found; a failure leaves things as they
were."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import common.build.build
from common import (
    CheckpointError,
    MoetelError,
    PlanError,
    Store,
    StoreError,
    UnknownTenantError,
    add_tenant,
    plan_round_robin,
    remove_tenant,
)
from common.build.build import replan
from common.checkpoints import TensorRef, open_checkpoint
from common.dtypes import to_float32
from common.plan.distance import measure
from common.plan.residual import LOW_RANK, SIGN, Part
from common.store.change import set_plan
from common.store.lock import exclusive
from tests import checkpoints, helpers
from tests.common.conftest import Family
from tests.helpers import rest_slow

# The plans that these tests state are those of the paper's rule.
build_store = partial(common.build.build.build_store, policy="round_robin")


@pytest.fixture
def store(family: Family, tmp_path: Path) -> Store:
    return build_store(tmp_path / "store", family.paths, slots=5)


def test_a_store_holds_every_tensor_and_the_papers_plan(store: Store, family: Family) -> None:
    assert store.tenants == ("base", "ana", "bob")
    assert store.verify() == []
    for name, path in family.paths.items():
        for tensor, array in open_checkpoint(path).stream():
            assert np.array_equal(store.ref(name, tensor).read(), array)
    exact = measure([(n, open_checkpoint(p)) for n, p in family.paths.items()])
    np.testing.assert_allclose(store.distances.matrix, exact.matrix, rtol=1e-6)
    assert store.plan == plan_round_robin(store.distances.score(), store.tenants, 5)
    layers = store.manifest.similarity["layers"]
    np.testing.assert_allclose(
        [s["mean"] for s in layers], exact.matrix.mean(axis=(0, 2)), rtol=1e-6
    )
    provenance = store.manifest.provenance
    assert provenance["settings"] == {
        "policy": "round_robin",
        "slots": 5,
        "budget_bytes": None,
        "extra": None,
        "traffic": {},
    }
    assert set(provenance["versions"]) == {"moetel", "python", "numpy", "safetensors"}
    assert store.tenant("ana").source == str(family.paths["ana"])


def test_memory_figures(store: Store) -> None:
    expert = 3 * 32 * 64 * 4
    other = (2 * 96 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 4 * 32)) * 4
    assert store.copy_bytes == expert
    assert store.non_expert_bytes("ana") == other
    assert store.bytes_before == 3 * (8 * expert + other)
    assert store.bytes_after == 5 * expert + 3 * other
    assert store.bytes_budget == 5 * expert + other


@pytest.mark.parametrize(("extra", "slots"), [(0, 1), (1, 1), (3, 4), (100, 8)])
def test_budget_buys_slots(family: Family, tmp_path: Path, extra: int, slots: int) -> None:
    measured = build_store(tmp_path / "measured", family.paths, slots=0)
    fixed = max(measured.non_expert_bytes(n) for n in measured.tenants)
    budget = fixed + (1 + extra) * measured.copy_bytes - (extra == 1)
    store = build_store(tmp_path / "store", family.paths, budget_bytes=budget)
    assert store.plan.num_slots == slots
    assert store.bytes_budget <= budget


def lora(model: checkpoints.Model) -> checkpoints.Model:
    """A fine-tune that touches attention alone, as a merged LoRA of q does."""
    for layer in range(2):
        model = model.changed(
            f"model.layers.{layer}.self_attn.q_proj.weight", lambda w: np.add(w, 0.1, out=w)
        )
    return model


def test_identical_tensors_are_stored_once(tmp_path: Path) -> None:
    base = checkpoints.random_mixtral(0)
    half = lora(base).changed(EXPERTS, lambda w: np.add(w, 0.1, out=w))  # and one expert
    models = {"base": base, "lora": lora(base), "half": half}
    paths = {n: checkpoints.save(m, tmp_path / n) for n, m in models.items()}
    store = build_store(tmp_path / "store", paths, slots="all")
    # 8 positions once, one of them twice.
    assert store.plan.num_slots == 9
    assert sum(len(store.plan.users(i)) for i in range(9)) == 24
    tensors = len(store.tenant("base").tensors)
    assert len(store.manifest.objects) == tensors + 2 + 1 + 1  # two q_proj, one w2, the distances


def test_adding_and_removing_equals_building(family: Family, tmp_path: Path) -> None:
    names = family.names
    fresh = build_store(tmp_path / "fresh", family.paths, slots=6)
    path = tmp_path / "grown"
    build_store(path, {n: family.paths[n] for n in names[:2]}, slots=6)
    grown = add_tenant(path, names[2], family.paths[names[2]])
    assert grown.plan == fresh.plan
    assert np.array_equal(grown.distances.matrix, fresh.distances.matrix)
    assert set(grown.manifest.objects) == set(fresh.manifest.objects)
    shrunk = remove_tenant(path, names[0])
    rebuilt = build_store(tmp_path / "rebuilt", {n: family.paths[n] for n in names[1:]}, slots=6)
    assert shrunk.plan == rebuilt.plan
    files = set(helpers.fingerprint(path)) - {"store.json"}
    assert files == set(helpers.fingerprint(tmp_path / "rebuilt")) - {"store.json"}
    assert shrunk.verify() == []


def test_a_store_can_be_replaced(family: Family, tmp_path: Path) -> None:
    build_store(tmp_path / "store", family.paths, slots=3)
    store = build_store(tmp_path / "store", {"ana": family.paths["ana"]}, slots=2)
    assert store.tenants == ("ana",) and store.verify() == []
    assert store.objects.unreferenced(set(store.manifest.objects)) == []


def test_dtypes(family: Family, tmp_path: Path) -> None:
    half = checkpoints.save(family.models[1].to("bfloat16"), tmp_path / "half")
    narrow = checkpoints.save(family.models[2].to("float16"), tmp_path / "narrow")
    mixed = {"base": family.paths["base"], "half": half, "narrow": narrow}
    auto = build_store(tmp_path / "auto", mixed)
    assert auto.dtype == "float32"
    assert auto.tenant("base").notes == ()
    assert auto.tenant("half").notes == (
        "the store is float32, which holds bfloat16, float16 and float32 without rounding; "
        "--dtype bfloat16 takes half the memory, and rounds",
        f"{len(auto.tenant('half').tensors)} tensors converted from bfloat16 to float32 (without "
        "loss)",
    )
    name = "model.norm.weight"
    assert np.array_equal(
        auto.ref("half", name).read(), to_float32(open_checkpoint(half).tensors[name].read())
    )
    forced = build_store(tmp_path / "forced", mixed, dtype="bfloat16")
    assert "converted from float32 to bfloat16 (rounded)" in forced.tenant("base").notes[0]
    assert forced.copy_bytes * 2 == auto.copy_bytes
    assert build_store(tmp_path / "same", {"narrow": narrow}).dtype == "float16"


def test_the_assets_travel(family: Family, tmp_path: Path) -> None:
    path = shutil.copytree(family.paths["ana"], tmp_path / "ana")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "notes.txt").write_text("not an asset")
    store = build_store(tmp_path / "store", {"ana": path})
    kept = store.assets_dir("ana")
    assert sorted(p.name for p in kept.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
    ]
    for file in kept.iterdir():
        assert file.read_bytes() == (path / file.name).read_bytes()
    store.export("ana", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    given, found = (
        json.loads((p / "generation_config.json").read_text()) for p in (path, tmp_path / "out")
    )
    assert given.items() <= found.items()


@pytest.mark.parametrize("slots", [4, None, "all"])
def test_export_is_the_tenant_as_served(family: Family, tmp_path: Path, slots: Any) -> None:
    store = build_store(tmp_path / "store", family.paths, slots=slots)
    for name in store.tenants:
        store.export(name, tmp_path / f"out-{name}")
        found = {
            n: ref.read() for n, ref in open_checkpoint(tmp_path / f"out-{name}").tensors.items()
        }
        for layer, expert in np.ndindex(store.experts.num_layers, store.experts.num_experts):
            for projection, weight in store.served_expert(name, layer, expert).items():
                tensor = store.family.expert_tensor(store.config(name), layer, expert, projection)
                assert np.array_equal(found.pop(tensor), weight)
        for tensor, value in found.items():
            assert np.array_equal(value, store.ref(name, tensor).read()), tensor
    with pytest.raises(StoreError, match="not an empty directory"):
        store.export("ana", tmp_path / "out-ana")
    with pytest.raises(UnknownTenantError, match=r"no tenant 'nobody'.*base, ana, bob"):
        store.export("nobody", tmp_path / "out-nobody")
    assert not (tmp_path / "out-nobody").exists()


@pytest.mark.parametrize("seed", rest_slow(range(25), 5))
def test_a_flipped_bit_anywhere_is_found(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    files = [p for p in sorted(store.path.rglob("*")) if p.is_file() and p.name != ".lock"]
    # Few of many files are not objects: pick them as often.
    others = [p for p in files if p.suffix != ".safetensors"]
    path = rng.choice(rng.choice([files, others]))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    if path.name == "store.json":
        # A flip between two kinds of white space changes no value; every other one is refused.
        try:
            found = Store.open(store.path).manifest.to_json()
        except StoreError as error:
            assert str(path) in str(error)
        else:
            assert found == store.manifest.to_json()
    else:
        assert [p.file for p in Store.open(store.path).verify()] == [path]


def test_missing_and_truncated_files_are_named(store: Store) -> None:
    tensor = "model.layers.0.self_attn.o_proj.weight"
    object_id = store.tenant("ana").tensors[tensor]
    path = store.objects.path(object_id)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    (problem,) = store.verify()
    assert problem.file == path and "truncated" in problem.what
    assert store.owners_of(object_id) == [f"ana: {tensor}"]
    path.unlink()
    (problem,) = store.verify()
    assert problem.file == path and "missing" in problem.what
    # Building again mends it, although its other objects are taken as they are.
    data = {n: Path(store.tenant(n).source) for n in store.tenants}  # type: ignore[assignment]
    assert build_store(store.path, data, slots=5).verify() == []  # type: ignore[arg-type]


def test_building_again_mends_a_damaged_object(store: Store, family: Family) -> None:
    path = store.objects.path(store.tenant("ana").tensors["model.norm.weight"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert build_store(store.path, family.paths, slots=5).verify() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"not a store, there is no store\.json.*moetel build"),
        ("{", r"store\.json: damaged"),
        ('{"format": "other"}', r"not the manifest of a Moetel store"),
        (
            '{"format": "moetel-store", "version": 99}',
            r"format version 99, this code reads versions 1 to 3",
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


def other(tmp_path: Path, **changes: Any) -> Path:
    return checkpoints.save(checkpoints.random_mixtral(9, **changes), tmp_path / "other")


def poisoned(family: Family, tmp_path: Path, name: str, value: float) -> Path:
    return checkpoints.save(
        family.models[0].changed(name, lambda w: w.put(7, value)), tmp_path / "poisoned"
    )


EXPERTS = "model.layers.1.block_sparse_moe.experts.0.w2.weight"

BAD_BUILDS: dict[str, tuple[Callable[[Family, Path], dict[str, Any]], type[MoetelError], str]] = {
    "no tenant": (lambda f, t: {"tenants": {}}, StoreError, "at least one tenant"),
    "path-like name": (
        lambda f, t: {"tenants": {"../x": f.paths["ana"]}},
        StoreError,
        r"'\.\./x' is not allowed; use",
    ),
    "name with slash": (
        lambda f, t: {"tenants": {"a/b": f.paths["ana"]}},
        StoreError,
        "'a/b' is not allowed",
    ),
    "hidden name": (
        lambda f, t: {"tenants": {".x": f.paths["ana"]}},
        StoreError,
        r"'\.x' is not allowed",
    ),
    "empty name": (lambda f, t: {"tenants": {"": f.paths["ana"]}}, StoreError, "'' is not allowed"),
    "newline in name": (
        lambda f, t: {"tenants": {"a\n": f.paths["ana"]}},
        StoreError,
        "is not allowed",
    ),
    "name twice": (
        lambda f, t: {"tenants": [("a", f.paths["ana"]), ("a", f.paths["bob"])]},
        StoreError,
        "'a' is given twice",
    ),
    "no checkpoint": (
        lambda f, t: {"tenants": {"a": t / "none"}},
        CheckpointError,
        "none: no such directory",
    ),
    "other expert count": (
        lambda f, t: {"tenants": {"a": f.paths["ana"], "b": other(t, num_local_experts=3)}},
        StoreError,
        r"'a' and 'b' cannot share experts \(num_experts: 4 != 3\)",
    ),
    "other expert size": (
        lambda f, t: {"tenants": {"a": f.paths["ana"], "b": other(t, intermediate_size=40)}},
        StoreError,
        "intermediate_size: 64 != 40",
    ),
    "other depth": (
        lambda f, t: {"tenants": {"a": f.paths["ana"], "b": other(t, num_hidden_layers=3)}},
        StoreError,
        "num_layers: 2 != 3",
    ),
    "other activation": (
        lambda f, t: {"tenants": {"a": f.paths["ana"], "b": other(t, hidden_act="gelu")}},
        StoreError,
        "activation: silu != gelu",
    ),
    "other top-k": (
        lambda f, t: {"tenants": {"a": f.paths["ana"], "b": other(t, num_experts_per_tok=1)}},
        StoreError,
        "top_k: 2 != 1",
    ),
    "too many slots": (lambda f, t: {"slots": 9}, PlanError, r"9 slots, .* give 0\.\.8, or 'all'"),
    "negative slots": (
        lambda f, t: {"slots": -1},
        PlanError,
        "slots is -1; give a whole number from 0",
    ),
    "unknown slots": (lambda f, t: {"slots": "many"}, PlanError, "slots is 'many'"),
    "unknown policy": (
        lambda f, t: {"policy": "best"},
        PlanError,
        "no policy 'best'; there is: round_robin",
    ),
    "budget as text": (
        lambda f, t: {"budget_bytes": "1GiB"},
        PlanError,
        "budget_bytes is '1GiB'; give a whole number",
    ),
    "slots and budget": (
        lambda f, t: {"slots": 1, "budget_bytes": 10**9},
        PlanError,
        "give one of slots, a budget, and a share",
    ),
    "budget too small": (
        lambda f, t: {"budget_bytes": 30_000},
        PlanError,
        "too small for one tenant.*give at least",
    ),
    "unknown dtype": (
        lambda f, t: {"dtype": "int8"},
        StoreError,
        "dtype 'int8' is not one of auto",
    ),
    "NaN expert": (
        lambda f, t: {"tenants": {"a": f.paths["ana"], "b": poisoned(f, t, EXPERTS, float("nan"))}},
        CheckpointError,
        r"poisoned.*layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight of tenant 'b' holds "
        r"NaN.*fix the checkpoint",
    ),
    "infinite norm": (
        lambda f, t: {"tenants": {"b": poisoned(f, t, "model.norm.weight", float("inf"))}},
        CheckpointError,
        r"model\.norm\.weight of tenant 'b' holds NaN or infinite",
    ),
    "overflow": (
        lambda f, t: {"tenants": {"b": poisoned(f, t, EXPERTS, 1e6)}, "dtype": "float16"},
        CheckpointError,
        r"after conversion from float32 to float16.*--dtype float32",
    ),
}


@pytest.mark.parametrize("existing", rest_slow([True, False]), ids=["over a store", "new"])
@pytest.mark.parametrize("kind", BAD_BUILDS)
def test_a_refused_build_leaves_things_as_they_were(
    kind: str, existing: bool, family: Family, tmp_path: Path
) -> None:
    make, error, message = BAD_BUILDS[kind]
    path = tmp_path / "place" / "store"
    path.parent.mkdir()
    if existing:
        build_store(path, {"old": family.paths["base"]})
    before = helpers.fingerprint(path.parent)
    arguments = {"tenants": family.paths} | make(family, tmp_path)
    with pytest.raises(error, match=message):
        build_store(path, **arguments)
    assert helpers.fingerprint(path.parent) == before
    assert path.exists() == existing


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


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_a_store_is_never_replaced(kind: str, family: Family, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("data")
    else:
        path.mkdir()
        (path / "data").write_text("data")
    with pytest.raises(
        StoreError, match=r"precious: exists and is not a store; name another place"
    ):
        build_store(path, family.paths)
    assert (path if kind == "file" else path / "data").read_text() == "data"


def test_an_empty_folder_may_become_a_store(family: Family, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert build_store(tmp_path / "store", family.paths).verify() == []


def test_two_writers_at_once_are_refused(store: Store, family: Family, tmp_path: Path) -> None:
    before = helpers.fingerprint(store.path)
    with (
        exclusive(store.path),
        pytest.raises(StoreError, match="another process is writing this store; wait"),
    ):
        build_store(store.path, family.paths)
    assert helpers.fingerprint(store.path) == before
    staging = tmp_path / ".new.building"
    staging.mkdir()
    with exclusive(staging), pytest.raises(StoreError, match="another process is writing"):
        build_store(tmp_path / "new", family.paths)
    build_store(tmp_path / "new", family.paths)
    assert not staging.exists()


def test_a_damaged_store_is_mended_by_building_again(
    store: Store, family: Family, tmp_path: Path
) -> None:
    manifest = store.path / "store.json"
    manifest.write_bytes(manifest.read_bytes()[:1000])
    before = helpers.fingerprint(store.path)
    with pytest.raises(CheckpointError, match="NaN"):
        build_store(store.path, {"b": poisoned(family, tmp_path, EXPERTS, float("nan"))})
    assert set(before) <= set(helpers.fingerprint(store.path))
    assert build_store(store.path, family.paths, slots=5).verify() == []


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
    again = build_store(store.path, family.paths)
    assert again.objects.unreferenced(set(again.manifest.objects)) == []
    assert not (store.path / "assets" / "orphan").exists()


def test_the_manifest_is_documented_json(store: Store) -> None:
    value = json.loads((store.path / "store.json").read_text())
    assert (value["format"], value["version"]) == ("moetel-store", 3)
    assert {
        "checksum",
        "family",
        "dtype",
        "provenance",
        "tenants",
        "plan",
        "similarity",
        "objects",
    } <= set(value)


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
    store = build_store(tmp_path / "store", {n: family.paths[n] for n in family.names[:2]})
    tensors = len(store.tenant("base").tensors)
    assert len(reads) == len(set(reads)) == 2 * tensors
    add_tenant(store.path, "bob", family.paths["bob"])
    assert len(reads) == len(set(reads)) == 3 * tensors


def test_a_tenant_joins_in_the_stores_type(family: Family, tmp_path: Path) -> None:
    half = checkpoints.save(family.models[0].to("bfloat16"), tmp_path / "half")
    store = build_store(tmp_path / "store", {"half": half})
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
    store = build_store(tmp_path / "store", two)
    before = helpers.fingerprint(tmp_path)
    steps: list[Callable[[], Any]] = [
        lambda: build_store(tmp_path / "new", two),
        lambda: build_store(store.path, family.paths),
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
    assert build_store(store.path, family.paths, slots=5).verify() == []


def flip(path: Path) -> None:
    """The last byte of a file, which is a weight's."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_expert_is_never_compared(store: Store, family: Family, tmp_path: Path) -> None:
    """Its distances would be kept, and the plan made by them, with nothing wrong to be seen."""
    tensor = store.family.expert_tensor(store.config("ana"), 1, 2, "down")
    path = store.objects.path(store.tenant("ana").tensors[tensor])
    flip(path)
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
            match=rf"{path}: content does not match its checksum; `moetel verify {store.path}`",
        ):
            change()
        assert helpers.fingerprint(store.path) == before
    assert [p.file for p in Store.open(store.path).verify()] == [path]
    # Without the tenant whose it is, all is well again.
    assert remove_tenant(store.path, "ana").verify() == []
    assert add_tenant(store.path, "ana", family.paths["ana"]).verify() == []


def test_damaged_distances_are_never_planned_with(store: Store) -> None:
    kept = store.manifest.similarity["object"]
    flip(store.objects.path(kept))
    before = helpers.fingerprint(store.path)
    with pytest.raises(StoreError, match=rf"{kept}.*: content does not match its checksum"):
        remove_tenant(store.path, "bob")
    assert helpers.fingerprint(store.path) == before


def test_places_by_other_names(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"ana": family.paths["ana"]}
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert build_store(tmp_path / "link", one).verify() == []
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "store.json").is_file()
    monkeypatch.chdir(tmp_path / "real")
    assert build_store(".", one, slots=1).plan.num_slots == 1  # a store is changed in place
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        StoreError, match=r"^\.: the directory you are in cannot become a store; name one in it"
    ):
        build_store(".", one)
    with pytest.raises(
        StoreError, match=r"here: the directory you are in cannot be replaced; .* \./ana"
    ):
        Store.open(tmp_path / "real").export("ana", ".")
    assert list(Path(".").iterdir()) == []
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["here", "link", "real"]
    with pytest.raises(StoreError, match=r"config\.json/store: cannot be written"):
        build_store(family.paths["ana"] / "config.json" / "store", one)


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
