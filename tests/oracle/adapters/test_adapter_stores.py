"""Stores of a base and its adapters: nothing is fitted, nothing that an adapter leaves alone is
read again, and what it adds is held at its own bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import (
    Store,
    add_tenant,
    build_store,
    extend_store,
    load_engine,
    pack_store,
    remove_tenant,
)
from common.build.build import replan
from common.checkpoints import TensorRef
from common.plan.plan import MERGED
from common.store.kinds import kind_of
from common.store.pack import bytes_by_part
from tests import families, helpers
from tests.oracle.adapters import made

IDS = [[1, 20, 30, 40, 77, 5]]
RANK = 2
FUSED = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters of its experts (`each`, `fused`) and of its attention, and what PEFT merges
    `each` to."""
    path = tmp_path_factory.mktemp("adapters")
    model = helpers.random_mixtral(1)
    helpers.save(model, path / "base")
    each = made.peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["w1", "w2", "w3"])
    made.older(path / "base", each, path / "each", path / "merged")
    model = helpers.load(path / "base")
    fused = made.peft.LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=FUSED)
    theirs = made.adapter(model, fused, path / "fused")
    made.merged(theirs).save_pretrained(path / "fused-merged")
    attention = made.peft.LoraConfig(r=RANK, target_modules=["q_proj"])
    made.adapter(model, attention, path / "attention")
    return path


def tenants(work: Path, *names: str) -> dict[str, Path]:
    return {name: work / name for name in names}


def bases(work: Path, *names: str) -> dict[str, Path]:
    return dict.fromkeys(names, work / "base")


def build(work: Path, to: Path, *names: str, **options: Any) -> Store:
    adapters = [n for n in names if n != "base"]
    return build_store(to, tenants(work, *names), bases=bases(work, *adapters), **options)


def logits(store: Store, name: str) -> np.ndarray:
    with load_engine(store.path, dtype="float32") as engine:
        return np.asarray(engine.logits(name, IDS))


def tensor_bytes(adapter: Path, part: str) -> int:
    from safetensors.numpy import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return sum(v.nbytes for name, v in tensors.items() if part in name)


@contextmanager
def reads() -> Iterator[list[tuple[Path, str]]]:
    """File and tensor of each read of a tensor."""
    found: list[tuple[Path, str]] = []
    before = TensorRef.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TensorRef,
            "read",
            lambda ref: (found.append((ref.path, ref.file_tensor)), before(ref))[1],
        )
        yield found


def test_experts_cost_their_adapter_and_answer_exactly(work: Path, tmp_path: Path) -> None:
    """As served, not only as kept: within the tolerance of nothing shared."""
    store = build(work, tmp_path / "store", "base", "each", "attention")
    spec = store.experts
    assert [copy.owner for copy in store.plan.copies] == [0] * spec.num_positions
    assert {r.tenant for r in store.plan.residuals} == {1}
    assert all(p.size == RANK and p.bits == 32 for r in store.plan.residuals for p in r.parts)
    # Of each matrix 4 bytes a component, for its scale, and padding to 16 bytes.
    matrices = spec.num_positions * len(spec.projections)
    scales = matrices * (4 * RANK + 15)
    assert store.residual_bytes <= tensor_bytes(work / "each", "experts") + scales
    assert store.residual_bytes <= (work / "each" / "adapter_model.safetensors").stat().st_size
    helpers.assert_close(
        logits(store, "each"), helpers.hf_logits(helpers.load(work / "merged"), IDS)
    )
    helpers.assert_close(logits(store, "base"), helpers.hf_logits(helpers.load(work / "base"), IDS))
    assert str(kind_of(store, "each", "base")) == "low rank 2, 8 of 8 experts moved"
    assert str(kind_of(store, "attention", "base")) == "attention only"
    assert "low rank 2, 8 of 8 experts moved (LoRA of rank 2)" in store.tenant("each").notes[0]
    assert "attention only (LoRA of rank 2)" in store.tenant("attention").notes[0]
    assert not store.verify()


def test_a_factor_of_stacked_experts_is_held_once(work: Path, tmp_path: Path) -> None:
    store = build(work, tmp_path / "store", "base", "fused")
    assert all(p.size == RANK for r in store.plan.residuals for p in r.parts)
    assert all([p.like for p in r.parts] == [None, 0, None] for r in store.plan.residuals)
    spec = store.experts
    scales = spec.num_positions * len(spec.projections) * (4 * RANK + 15)
    assert store.residual_bytes <= tensor_bytes(work / "fused", "experts") + scales
    helpers.assert_close(
        logits(store, "fused"), helpers.hf_logits(helpers.load(work / "fused-merged"), IDS)
    )


def test_sixteen_bits_hold_half(work: Path, tmp_path: Path) -> None:
    store = build(work, tmp_path / "store", "base", "fused", dtype="bfloat16")
    assert {p.bits for r in store.plan.residuals for p in r.parts} == {16}
    assert all(p.size == RANK for r in store.plan.residuals for p in r.parts)
    assert store.residual_bytes < 0.8 * tensor_bytes(work / "fused", "experts")
    # The rounded base and the adapter beside it are nearer than a merge that is rounded.
    base, merged = (
        helpers.expert_modules(helpers.load(work / name))[1].down_proj.detach().numpy()[2]
        for name in ("base", "fused-merged")
    )
    exact = store.own_expert("base", 1, 2)["down"] + (merged - base)
    served, kept = (
        np.abs(found["down"] - exact).max()
        for found in (store.served_expert("fused", 1, 2), store.own_expert("fused", 1, 2))
    )
    assert served < 1e-3 * np.abs(merged - base).max() < kept


def test_adapters_alone_share_their_base(work: Path, tmp_path: Path) -> None:
    """Which is then a copy that no tenant has."""
    store = build(work, tmp_path / "store", "each", "fused", "attention")
    assert [copy.owner for copy in store.plan.copies] == [2] * store.experts.num_positions
    store = build(work, tmp_path / "store", "each", "fused")
    assert [copy.owner for copy in store.plan.copies] == [MERGED] * store.experts.num_positions
    assert {r.tenant for r in store.plan.residuals} == {0, 1}
    assert not store.verify()
    for name, merged in (("each", "merged"), ("fused", "fused-merged")):
        helpers.assert_close(
            logits(store, name), helpers.hf_logits(helpers.load(work / merged), IDS)
        )


def test_changes_keep_what_adapters_said(work: Path, tmp_path: Path) -> None:
    """Tenants come and go, the base among them, and residuals stay the adapters' own."""
    store = build(work, tmp_path / "store", "base", "each")
    exact = {n: helpers.hf_logits(helpers.load(work / f), IDS) for n, f in MERGES.items()}
    store = add_tenant(store.path, "fused", work / "fused", base=work / "base")
    assert all(p.size == RANK for r in store.plan.residuals for p in r.parts)
    helpers.assert_close(logits(store, "fused"), exact["fused"])
    store = remove_tenant(store.path, "base")
    for name, expected in exact.items():
        helpers.assert_close(logits(store, name), expected)
    store = replan(store.path, extra=0.0)  # no residuals, so one copy for both
    assert not store.plan.residuals
    store = replan(store.path, extra=5.0)
    for name, expected in exact.items():
        helpers.assert_close(logits(store, name), expected)
    assert not store.verify()


MERGES = {"each": "merged", "fused": "fused-merged"}


def test_an_adapter_beside_the_plan(work: Path, tmp_path: Path) -> None:
    store = build(work, tmp_path / "store", "base", "attention")
    before = logits(store, "attention")
    store = extend_store(store.path, "each", work / "each", base=work / "base")
    assert all(p.size == RANK and p.bits == 32 for r in store.plan.residuals for p in r.parts)
    expected = helpers.hf_logits(helpers.load(work / "merged"), IDS)
    helpers.assert_close(logits(store, "each"), expected)
    np.testing.assert_array_equal(logits(store, "attention"), before)
    assert not store.verify()
    store = remove_tenant(store.path, "each", keep_plan=True)
    assert not store.plan.residuals and not store.verify()


def test_equal_experts_are_planned_without_a_look_at_them(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of adapters of attention. Another policy has plans of its own."""

    def planner(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be chosen")

    with monkeypatch.context() as patch:
        patch.setattr("common.build.assemble.Planner", planner)
        store = build(work, tmp_path / "store", "base", "attention")
    assert not store.plan.residuals and not store.plan.num_misses
    assert store.manifest.prediction is not None
    assert store.manifest.prediction["losses"] == [0.0, 0.0]
    store = build(work, tmp_path / "store", "base", "attention", policy="round_robin")
    assert len({copy.owner for copy in store.plan.copies}) == 2


def test_a_budget_that_is_less_is_spent_by_the_planner(work: Path, tmp_path: Path) -> None:
    store = build(work, tmp_path / "store", "base", "each", extra=0.02)
    assert 0 < store.extra_bytes <= 0.02 * store.experts.num_positions * store.copy_bytes
    assert {p.bits for r in store.plan.residuals for p in r.parts} != {32}


def test_an_adapter_that_is_larger_than_its_matrices_is_planned_as_a_fine_tune(
    work: Path, tmp_path: Path
) -> None:
    config = made.peft.LoraConfig(r=24, target_modules=[], target_parameters=FUSED)
    made.adapter(helpers.load(work / "base"), config, tmp_path / "large")
    paths = {**tenants(work, "base"), "large": tmp_path / "large"}
    store = build_store(tmp_path / "store", paths, bases=bases(work, "large"))
    assert not store.tenant("large").adapted
    assert store.residual_bytes <= 0.1 * store.experts.num_positions * store.copy_bytes


def test_a_full_fine_tune_beside_adapters_is_planned_as_before(work: Path, tmp_path: Path) -> None:
    helpers.save(helpers.tuned(helpers.load(work / "base"), 5), tmp_path / "full")
    paths = {**tenants(work, "base", "each"), "full": tmp_path / "full"}
    store = build_store(tmp_path / "store", paths, bases=bases(work, "each"))
    assert store.manifest.prediction is not None
    assert not store.verify()


def test_what_adapters_leave_alone_is_read_once(work: Path, tmp_path: Path) -> None:
    with reads() as found:
        build(work, tmp_path / "store", "base", "attention", "each", slots="all")
    of_base = [tensor for path, tensor in found if path.parent == work / "base"]
    again = {tensor for tensor in of_base if of_base.count(tensor) > 1}
    # q is read for the base and to be merged: tensors of tenants are read apart from experts'.
    assert all("q_proj" in tensor for tensor in again), again


def test_a_base_in_the_store_is_not_read_for_another_adapter(work: Path, tmp_path: Path) -> None:
    store = build(work, tmp_path / "store", "base")
    with reads() as found:
        store = add_tenant(store.path, "attention", work / "attention", base=work / "base")
    experts = [t for path, t in found if path.parent == work / "base" and ".experts." in t]
    # One expert of each layer, to tell whether the directory is still the one that was stored.
    spec = store.experts
    assert len(experts) == spec.num_layers * len(spec.projections)
    assert str(kind_of(store, "attention", "base")) == "attention only"


def test_a_base_that_changed_since_is_read_anew(work: Path, tmp_path: Path) -> None:
    base = helpers.save(families.random("mixtral", 3), tmp_path / "base")
    config = made.peft.LoraConfig(r=RANK, target_modules=["q_proj"])
    made.adapter(families.random("mixtral", 4), config, tmp_path / "adapter")
    store = build_store(tmp_path / "store", {"base": base})
    helpers.save(families.random("mixtral", 4), base)
    store = add_tenant(store.path, "t", tmp_path / "adapter", base=base)
    assert str(kind_of(store, "t", "base")) == "full"


@pytest.mark.parametrize("own_experts", ["reference", "none"])
def test_adapters_need_no_experts_of_their_own(
    work: Path, tmp_path: Path, own_experts: str
) -> None:
    """Their merged experts are never used, so a packed store has the base's experts alone."""
    store = build(work, tmp_path / "copy", "base", "each", "fused")
    other = build(work, tmp_path / "other", "base", "each", "fused", own_experts=own_experts)
    packed = pack_store(other, tmp_path / "packed")
    assert other.plan == packed.plan == store.plan and packed.verify() == []
    one = store.experts.num_positions * store.copy_bytes
    parts = bytes_by_part(packed)
    assert parts["resident copies"] == one
    assert parts["own experts that are not resident"] == 0
    for name in store.tenants:
        expected = logits(store, name)
        # Where a weight lies in memory may change the order of torch's sums.
        helpers.assert_close(logits(other, name), expected)
        helpers.assert_close(logits(packed, name), expected)
