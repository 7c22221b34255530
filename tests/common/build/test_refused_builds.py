"""Builds that are refused leave things as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import (
    CheckpointError,
    MoetelError,
    PlanError,
    Store,
    StoreError,
)
from tests import helpers
from tests.common.conftest import Family
from tests.common.unfit import EXPERTS, other, poisoned
from tests.helpers import build_round_robin, rest_slow

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
        build_round_robin(path, {"old": family.paths["base"]})
    before = helpers.fingerprint(path.parent)
    arguments = {"tenants": family.paths} | make(family, tmp_path)
    with pytest.raises(error, match=message):
        build_round_robin(path, **arguments)
    assert helpers.fingerprint(path.parent) == before
    assert path.exists() == existing


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
        build_round_robin(path, family.paths)
    assert (path if kind == "file" else path / "data").read_text() == "data"


def test_an_empty_folder_may_become_a_store(family: Family, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert build_round_robin(tmp_path / "store", family.paths).verify() == []


def test_places_by_other_names(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"ana": family.paths["ana"]}
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert build_round_robin(tmp_path / "link", one).verify() == []
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "store.json").is_file()
    monkeypatch.chdir(tmp_path / "real")
    assert build_round_robin(".", one, slots=1).plan.num_slots == 1  # a store is changed in place
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        StoreError, match=r"^\.: the directory you are in cannot become a store; name one in it"
    ):
        build_round_robin(".", one)
    with pytest.raises(
        StoreError, match=r"here: the directory you are in cannot be replaced; .* \./ana"
    ):
        Store.open(tmp_path / "real").export("ana", ".")
    assert list(Path(".").iterdir()) == []
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["here", "link", "real"]
    with pytest.raises(StoreError, match=r"config\.json/store: cannot be written"):
        build_round_robin(family.paths["ana"] / "config.json" / "store", one)
