"""Tenants that join without a new plan: what others are served stays bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    UnknownTenantError,
    add_tenant,
    build_store,
    extend_store,
    remove_tenant,
)
from common.build.beside import BESIDE
from common.build.build import replan
from common.plan.plan import MERGED, MISS
from common.planning.policies import DEFAULT_EXTRA
from common.store.change import set_plan
from common.store.lock import exclusive
from scripts import cli
from tests import checkpoints, helpers
from tests.common.build.conftest import PLANS
from tests.common.conftest import Family
from tests.helpers import rest_slow
from tests.served import check, equal, nearest, own, served, squared


def test_a_tenant_joins_beside_any_plan(store: Store, newcomer: Path) -> None:
    before = {name: served(store, name) for name in store.tenants}
    contents = [store.slot_content(i) for i in range(store.plan.num_slots)]
    grown = extend_store(store.path, "cy", newcomer)
    check(grown)
    assert grown.tenants == (*store.tenants, "cy") and grown.plan.tenants == grown.tenants
    for name, weights in before.items():
        assert equal(served(grown, name), weights)
    assert [grown.slot_content(i) for i in range(grown.plan.num_slots)] == contents
    assert np.array_equal(grown.plan.serving[:-1], store.plan.serving)
    assert [replace(c, mix=c.mix[:-1]) for c in grown.plan.copies] == list(store.plan.copies)
    kept = len(store.plan.residuals)
    assert grown.plan.residuals[:kept] == store.plan.residuals
    assert grown.manifest.residuals[:kept] == store.manifest.residuals
    assert {r.tenant for r in grown.plan.residuals[kept:]} <= {3}
    for layer, expert in np.ndindex(*grown.plan.serving.shape[1:]):
        assert grown.plan.serving[3, layer, expert] == nearest(grown, "cy", layer, expert)
    # As wide as for a planned tenant, so far as the policy knows what to do with bytes.
    one_model = store.experts.num_positions * store.copy_bytes
    asked = store.manifest.provenance["settings"]
    share = 0.0
    if asked["policy"] in ("residual", "sign") and asked["slots"] is None:
        share = DEFAULT_EXTRA if asked["extra"] is None else asked["extra"] / 3
    took = grown.residual_bytes - store.residual_bytes
    assert 0.8 * share * one_model <= took <= share * one_model
    assert grown.manifest.provenance[BESIDE] == {"added": ["cy"], "removed": []}


@pytest.mark.slow
def test_distances_and_the_next_plan_are_those_of_a_fresh_build(
    family: Family, newcomer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    for options in (PLANS["paper"], PLANS["misses"], PLANS["residuals"]):
        fresh = build_store(tmp_path / "fresh", family.paths | {"cy": newcomer}, **options)
        build_store(path, family.paths, **options)
        grown = extend_store(path, "cy", newcomer)
        assert np.array_equal(grown.distances.matrix, fresh.distances.matrix)
        assert grown.manifest.similarity == fresh.manifest.similarity
        again = replan(path)
        assert again.plan == fresh.plan and set(again.manifest.objects) == set(
            fresh.manifest.objects
        )
        assert again.manifest.prediction == fresh.manifest.prediction
        assert BESIDE not in again.manifest.provenance
        check(again)
    # And so for a tenant that is added or removed with a new plan.
    build_store(path, {n: family.paths[n] for n in ("base", "ana")}, policy="round_robin")
    extend_store(path, "bob", family.paths["bob"])
    grown = add_tenant(path, "cy", newcomer)
    fresh = build_store(tmp_path / "fresh", family.paths | {"cy": newcomer}, policy="round_robin")
    assert grown.plan == fresh.plan and BESIDE not in grown.manifest.provenance
    remove_tenant(path, "ana", keep_plan=True)
    rest = {n: p for n, p in (family.paths | {"cy": newcomer}).items() if n != "ana"}
    assert replan(path).plan == build_store(tmp_path / "fresh", rest, policy="round_robin").plan


@pytest.mark.parametrize("dtype", rest_slow(["bfloat16", "float32"]))
def test_residuals_bring_the_newcomer_nearer(
    dtype: str, family: Family, newcomer: Path, tmp_path: Path
) -> None:
    errors, bare = [], 0.0
    for share in (0.0, 0.02, 0.1, 0.4, 3.0):
        path = build_store(
            tmp_path / "store", family.paths, policy="merge", extra=0, dtype=dtype
        ).path
        grown = extend_store(path, "cy", newcomer, extra=share)
        check(grown)
        assert grown.residual_bytes <= share * grown.experts.num_positions * grown.copy_bytes
        assert bool(grown.plan.residuals) == (share > 0)
        errors.append(squared(served(grown, "cy"), own(grown, "cy")))
        # Without calibration the prediction is what was measured, for every tenant.
        assert grown.manifest.prediction is not None and grown.manifest.prediction["bound"] is None
        top_k, experts = grown.experts.top_k, grown.experts.num_experts
        for name, loss in zip(grown.tenants, grown.manifest.prediction["losses"], strict=True):
            found = squared(served(grown, name), own(grown, name)) * top_k / experts
            np.testing.assert_allclose(loss, found, rtol=1e-4)
        bare = bare or errors[0]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * bare and errors[-1] < 0.01 * bare
    # No residual takes more than the tenant's own expert would.
    assert grown.residual_bytes <= grown.experts.num_positions * grown.copy_bytes


def test_the_papers_plan_takes_residuals_when_asked(
    family: Family, newcomer: Path, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "store", family.paths, **PLANS["misses"])
    grown = extend_store(store.path, "cy", newcomer, extra=0.2)
    bare = store.plan.serving[0] != MISS
    assert {(r.layer, r.expert) for r in grown.plan.residuals} <= set(
        map(tuple, np.argwhere(bare).tolist())
    )
    assert np.array_equal(grown.plan.serving[3] != MISS, bare)
    mine, found = own(grown, "cy"), served(grown, "cy")
    for place, (a, b) in enumerate(zip(mine, found, strict=True)):
        assert (squared([a], [b]) == 0) == (not bare.reshape(-1)[place])


def test_a_tenant_whose_experts_are_resident_needs_nothing(family: Family, tmp_path: Path) -> None:
    model = family.models[1]  # a LoRA that touches attention, and one expert of another
    for tensor in ("self_attn.q_proj", "block_sparse_moe.experts.2.w2"):
        layer = int("experts" in tensor)
        model = model.changed(
            f"model.layers.{layer}.{tensor}.weight", lambda w: np.add(w, 0.1, out=w)
        )
    checkpoint = checkpoints.save(model, tmp_path / "lora")
    store = build_store(tmp_path / "store", family.paths, slots="all")
    grown = extend_store(store.path, "lora", checkpoint, extra=0.5)
    check(grown)
    ana = grown.plan.serving[1].copy()
    assert np.array_equal(grown.plan.serving[3], ana)
    assert [(r.tenant, r.layer, r.expert) for r in grown.plan.residuals] == [(3, 1, 2)]
    # Its one tensor of experts, its projection, and what is new of distances and residuals.
    assert len(set(grown.manifest.objects) - set(store.manifest.objects)) == 4
    # When ana goes, its copies are those of the tenant that has the same, all but one.
    shrunk = remove_tenant(store.path, "ana", keep_plan=True)
    check(shrunk)
    owners = [shrunk.plan.copies[slot].owner for slot in shrunk.plan.serving[2].reshape(-1)]
    assert owners == [2] * 6 + [MERGED] + [2]


def test_mixtures_say_what_they_are_made_of(family: Family, newcomer: Path, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", family.paths, policy="round_robin")
    plan, merged = helpers.with_merged(store, [0, 3, 5])
    copies = list(plan.copies)
    half = {
        p: (merged[3][p] * 3 - store.own_expert("ana", *at)[p]) / 2
        for at in [_place(plan, 3)]
        for p in merged[3]
    }
    copies[3] = replace(copies[3], mix=(0.5, 0.0, 0.5))
    set_plan(store.path, replace(plan, copies=tuple(copies)), merged | {3: half})
    grown = extend_store(store.path, "cy", newcomer)
    assert grown.plan.copies[0].mix == (1 / 3, 1 / 3, 1 / 3, 0.0)
    assert grown.plan.copies[3].mix == (0.5, 0.0, 0.5, 0.0)
    shrunk = remove_tenant(store.path, "ana", keep_plan=True)
    assert shrunk.plan.copies[0].mix == () and shrunk.plan.copies[0].owner == MERGED
    assert shrunk.plan.copies[3].mix == (0.5, 0.5, 0.0)
    check(shrunk)


def _place(plan: Any, slot: int) -> tuple[int, int]:
    return plan.copies[slot].layer, plan.copies[slot].expert


@pytest.mark.slow
def test_extra_bytes_follow_the_stores_settings(
    family: Family, newcomer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    two = {n: family.paths[n] for n in ("base", "ana")}

    def took(options: dict[str, Any], **more: Any) -> float:
        store = build_store(path, two, **options)
        grown = extend_store(path, "cy", newcomer, **more)
        one_model = store.experts.num_positions * store.copy_bytes
        return (grown.residual_bytes - store.residual_bytes) / one_model

    assert 0.8 * DEFAULT_EXTRA < took({}) <= DEFAULT_EXTRA
    assert took({"extra": 0.0}) == 0.0 == took({"slots": 8})
    assert 0.08 < took({"extra": 0.2}) <= 0.1
    # No more than is left of a budget, and an error where what was asked for does not fit.
    loose = build_store(path, two, policy="merge")
    one_model = loose.experts.num_positions * loose.copy_bytes
    fixed = loose.non_expert_bytes("base") + one_model
    assert took({"budget_bytes": fixed}) == 0.0
    assert took({"policy": "merge", "budget_bytes": fixed + int(0.01 * one_model)}) <= 0.01
    assert took({"policy": "mean", "budget_bytes": fixed + one_model}, extra=0.3) > 0.25
    store = build_store(path, two, policy="mean", budget_bytes=fixed + int(0.1 * one_model))
    before = helpers.fingerprint(path)
    with pytest.raises(
        PlanError,
        match=r"with tenant 'cy' the store takes .* more than the budget of .* larger budget",
    ):
        extend_store(path, "cy", newcomer, extra=0.3)
    assert helpers.fingerprint(path) == before and store.verify() == []
    # Of what three tenants were planned with, a fourth and a fifth get as much as each.
    build_store(path, family.paths, extra=0.3)
    sizes = [extend_store(path, n, newcomer).residual_bytes / one_model for n in ("cy", "di")]
    assert 0.08 < sizes[1] - sizes[0] <= 0.1


def test_a_store_of_one_tenant_grows(family: Family, tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", {"base": family.paths["base"]})
    grown = extend_store(store.path, "ana", family.paths["ana"])
    assert (grown.plan.serving == np.arange(8).reshape(2, 4)).all()
    assert grown.plan.residuals and not grown.manifest.merged
    check(grown)
    rest = remove_tenant(store.path, "base", keep_plan=True)
    assert len(rest.manifest.merged) == 8 and rest.tenants == ("ana",)
    check(rest)


def test_refused_changes_leave_the_store_as_it_was(
    family: Family, newcomer: Path, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "store", family.paths, policy="mean")
    path, ana = store.path, family.paths["ana"]
    tensor = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    poison = family.models[0].changed(tensor, lambda w: w.put(7, float("nan")))
    poisoned = checkpoints.save(poison, tmp_path / "poisoned")
    narrow = checkpoints.save(
        checkpoints.random_mixtral(9, num_local_experts=3), tmp_path / "narrow"
    )
    bad: list[tuple[Callable[[], Any], type[MoetelError], str]] = [
        (lambda: extend_store(path, "ana", ana), StoreError, "'ana' is in this store already"),
        (lambda: extend_store(path, "../x", ana), StoreError, "is not allowed"),
        (lambda: extend_store(path, "x", narrow), StoreError, "cannot share experts"),
        (lambda: extend_store(path, "x", poisoned), CheckpointError, "NaN"),
        (lambda: extend_store(path, "x", tmp_path / "none"), CheckpointError, "no such directory"),
        (lambda: extend_store(path, "x", ana, extra=-1), PlanError, "extra is -1; give a share"),
        (lambda: extend_store(path, "x", ana, extra=True), PlanError, "extra is True"),
        (lambda: extend_store(tmp_path / "none", "x", ana), StoreError, "not a store"),
        (
            lambda: remove_tenant(path, "nobody", keep_plan=True),
            UnknownTenantError,
            "no tenant 'nobody'",
        ),
    ]
    before = helpers.fingerprint(path)
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            change()
        assert helpers.fingerprint(path) == before
    with exclusive(path), pytest.raises(StoreError, match="another process is writing this store"):
        extend_store(path, "cy", newcomer)
    assert helpers.fingerprint(path) == before
    # A merged copy is never measured against when it is damaged.
    damaged = store.manifest.merged[3]["down"]
    helpers.flip(store, damaged)
    before = helpers.fingerprint(path)
    with pytest.raises(StoreError, match=f"{damaged} does not match its checksum"):
        extend_store(path, "cy", newcomer)
    assert helpers.fingerprint(path) == before
    one = build_store(tmp_path / "one", {"ana": ana})
    with pytest.raises(StoreError, match="'ana' is the only one in this store"):
        remove_tenant(one.path, "ana", keep_plan=True)


def test_commands(
    family: Family, newcomer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_store(tmp_path / "store", family.paths).path

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    tenant = f"--tenant=cy={newcomer}"
    assert "beside the plan" not in run("inspect", path)[1]
    code, _, err = run("add", path, tenant, "--extra", "5%")
    assert code == 1 and "--extra goes with --keep-plan" in err
    code, _, err = run("add", path, tenant, "--keep-plan", "--calibrate", tmp_path / "none.jsonl")
    assert code == 1 and "makes no use of calibration" in err
    code, out, _ = run("add", path, tenant, "--keep-plan", "--extra", "5%")
    assert code == 0 and "4 tenants (base, ana, bob, cy)" in out
    out = run("inspect", path)[1]
    assert (
        "planned for 3 tenants, 1 added (cy) beside the plan; run `moetel plan --apply` to plan "
        "anew" in out
    )
    code, out, _ = run("remove", path, "--tenant", "base", "--keep-plan")
    assert code == 0 and "3 tenants (ana, bob, cy)" in out
    assert (
        "planned for 3 tenants, 1 added (cy) and 1 removed (base) beside the plan"
        in run("inspect", path)[1]
    )
    assert run("plan", path, "--extra", "10%", "--apply")[0] == 0
    assert "beside the plan" not in run("inspect", path)[1]
