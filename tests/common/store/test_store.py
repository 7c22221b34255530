"""Stores: what they keep, what they share, and what leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    Store,
    StoreError,
    UnknownTenantError,
    plan_round_robin,
)
from common.checkpoints import open_checkpoint
from common.dtypes import to_float32
from common.plan.distance import measure
from tests import checkpoints
from tests.common.conftest import Family
from tests.common.unfit import EXPERTS
from tests.helpers import build_round_robin


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
    measured = build_round_robin(tmp_path / "measured", family.paths, slots=0)
    fixed = max(measured.non_expert_bytes(n) for n in measured.tenants)
    budget = fixed + (1 + extra) * measured.copy_bytes - (extra == 1)
    store = build_round_robin(tmp_path / "store", family.paths, budget_bytes=budget)
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
    store = build_round_robin(tmp_path / "store", paths, slots="all")
    # 8 positions once, one of them twice.
    assert store.plan.num_slots == 9
    assert sum(len(store.plan.users(i)) for i in range(9)) == 24
    tensors = len(store.tenant("base").tensors)
    assert len(store.manifest.objects) == tensors + 2 + 1 + 1  # two q_proj, one w2, the distances


def test_dtypes(family: Family, tmp_path: Path) -> None:
    half = checkpoints.save(family.models[1].to("bfloat16"), tmp_path / "half")
    narrow = checkpoints.save(family.models[2].to("float16"), tmp_path / "narrow")
    mixed = {"base": family.paths["base"], "half": half, "narrow": narrow}
    auto = build_round_robin(tmp_path / "auto", mixed)
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
    forced = build_round_robin(tmp_path / "forced", mixed, dtype="bfloat16")
    assert "converted from float32 to bfloat16 (rounded)" in forced.tenant("base").notes[0]
    assert forced.copy_bytes * 2 == auto.copy_bytes
    assert build_round_robin(tmp_path / "same", {"narrow": narrow}).dtype == "float16"


def test_the_assets_travel(family: Family, tmp_path: Path) -> None:
    path = shutil.copytree(family.paths["ana"], tmp_path / "ana")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "notes.txt").write_text("not an asset")
    store = build_round_robin(tmp_path / "store", {"ana": path})
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
    store = build_round_robin(tmp_path / "store", family.paths, slots=slots)
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


def test_the_manifest_is_documented_json(store: Store) -> None:
    value = json.loads((store.path / "store.json").read_text())
    assert (value["format"], value["version"]) == ("moetel-store", 4)
    assert {
        "checksum",
        "family",
        "dtype",
        "provenance",
        "tenants",
        "plan",
        "similarity",
        "index",
    } <= set(value)
