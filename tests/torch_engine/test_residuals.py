"""Residuals and merged copies, against Hugging Face models that hold what the store serves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import SamplingParams, load_engine
from common.plan.residual import Part
from common.store import Store
from common.store.change import set_plan
from tests import helpers
from tests.conftest import Family
from tests.helpers import assert_close, hf_greedy, hf_logits, rest_slow
from tests.torch_engine.residual_stores import CASES, EVERY_KIND, PROJECTIONS, WAYS, prepared
from torch_engine.experts import grouped_pool
from torch_engine.experts.kernel_pool import KernelPool

NEW = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(autouse=True)
def no_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they take minutes; tests/torch_engine/test_grouped_residuals.py has them."""
    usual = grouped_pool.why_no_triton

    def why_not(device: torch.device) -> str | None:
        return "it would be interpreted" if device.type == "cpu" else usual(device)

    monkeypatch.setattr(grouped_pool, "why_no_triton", why_not)


def check(
    store: Store, models: Sequence[Any], ways: Sequence[dict[str, Any]], lengths: Sequence[int]
) -> None:
    """Logits of each tenant alone, and greedy tokens in batches of one tenant and of all."""
    oracles = [helpers.oracle_of_store(store, models, i) for i in range(len(models))]
    rows = helpers.prompts(5, lengths, models[0].config.vocab_size)
    expected = [[hf_logits(model, [row])[0] for row in rows] for model in oracles]
    greedy = [[hf_greedy(model, row, NEW.max_new_tokens) for row in rows] for model in oracles]
    for way in ways:
        with load_engine(store, **way) as engine:
            for i, name in enumerate(store.tenants):
                found = engine.logits(name, rows)
                for j, row in enumerate(rows):
                    assert_close(
                        found[j, : len(row)],
                        expected[i][j],
                        what=f"{name}, {way}, {len(row)} tokens",
                    )
                assert list(engine.generate(name, rows[0], NEW).token_ids) == greedy[i][0], (
                    name,
                    way,
                )
            mixed = [(i, j) for j in range(len(rows)) for i in range(len(models))]
            answers = engine.generate_batch([(store.tenants[i], rows[j]) for i, j in mixed], NEW)
            for (i, j), answer in zip(mixed, answers, strict=True):
                assert list(answer.token_ids) == greedy[i][j], (way, i, j)


@pytest.mark.parametrize("case", rest_slow(CASES, 3))
def test_every_way_to_multiply_serves_copies_plus_residuals(
    family: Family, tmp_path: Path, case: str
) -> None:
    store = prepared(tmp_path / "store", family.paths, case)
    assert store.plan.residuals
    check(store, family.models, WAYS, (9, 1, 17))


@pytest.mark.parametrize(
    "case", rest_slow(["several parts", "sign everywhere", "some projections, tenants and experts"])
)
def test_misses_beside_residuals(family: Family, tmp_path: Path, case: str) -> None:
    store = prepared(tmp_path / "store", family.paths, case, slots=3)
    assert store.plan.num_misses and store.plan.residuals
    check(store, family.models, [way | {"spare_slots": n} for way in WAYS for n in (1, 4)], (9, 2))


def test_a_long_prompt(family: Family, tmp_path: Path) -> None:
    """More rows of a copy than a work item of our own kernels has."""
    store = prepared(tmp_path / "store", family.paths, "several parts")
    check(store, family.models, WAYS[:1], (230,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    rest_slow(
        [
            {
                "hidden_size": 20,
                "intermediate_size": 27,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
            },
            {"hidden_size": 40, "intermediate_size": 64},
            {"intermediate_size": 48, "num_experts_per_tok": 3},
            {"num_experts_per_tok": 1, "hidden_act": "gelu"},
        ]
    ),
    ids=str,
)
def test_other_sizes(tmp_path: Path, sizes: dict[str, Any]) -> None:
    base = helpers.random_mixtral(3, **sizes)
    models = [base, helpers.tuned(base, 4)]
    paths = {n: helpers.save(m, tmp_path / n) for n, m in zip(("a", "b"), models, strict=True)}
    for i, case in enumerate(
        ("scales for 7 rows", "several parts", "some projections, tenants and experts")
    ):
        store = prepared(tmp_path / f"store{i}", paths, case)
        check(store, models, WAYS[:-1], (9, 4))


@pytest.mark.parametrize("seed", rest_slow(range(4)))
def test_any_mixture(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    base = helpers.random_mixtral(
        seed, hidden_size=rng.choice([32, 40]), intermediate_size=rng.choice([41, 64])
    )
    models = [base, *(helpers.tuned(base, i) for i in range(rng.randint(1, 3)))]
    paths = {f"t{i}": helpers.save(m, tmp_path / f"t{i}") for i, m in enumerate(models)}
    store = helpers.build_round_robin(tmp_path / "store", paths, slots=rng.choice(["all", None, 5]))
    plan, means = helpers.with_merged(
        store, rng.sample(range(store.plan.num_slots), store.plan.num_slots // 2)
    )

    def parts(_t: int, _l: int, _e: int) -> list[Part]:
        return [
            Part(rng.choice(PROJECTIONS), *rng.choice(EVERY_KIND))
            for _ in range(rng.choice([0, 0, 1, 2, 3]))
        ]

    plan, records = helpers.with_residuals(plan, dict(store.experts.projections), parts, seed)
    store = set_plan(tmp_path / "store", plan, merged=means, records=records)
    check(store, models, [{"products": p, "spare_slots": 2} for p in ("auto", "plain")], (13, 5))


def test_merged_copies_alone(family: Family, tmp_path: Path) -> None:
    store = helpers.build_round_robin(tmp_path / "store", family.paths, slots=6)
    plan, means = helpers.with_merged(store, range(6))
    check(set_plan(tmp_path / "store", plan, merged=means), family.models, WAYS, (9, 3))


@pytest.mark.parametrize("way", [{}, {"products": "plain"}, {"experts": "grouped"}], ids=str)
def test_bfloat16_is_close(tmp_path: Path, way: dict[str, Any]) -> None:
    """As close to exact arithmetic as Hugging Face's own bfloat16 with the sum of copy and residual
    rounded to it."""
    base = helpers.random_mixtral(0).to(torch.bfloat16)
    paths = {
        n: helpers.save(m, tmp_path / n)
        for n, m in zip(("a", "b"), (base, helpers.tuned(base, 1)), strict=True)
    }
    models = [helpers.load(path) for path in paths.values()]
    store = prepared(tmp_path / "store", paths, "several parts")
    assert store.dtype == "bfloat16"
    rows = helpers.prompts(0, [40])
    oracles = [helpers.oracle_of_store(store, models, i) for i in range(2)]
    exact = [hf_logits(oracle, rows) for oracle in oracles]
    with load_engine(store, **way) as engine:
        for i, name in enumerate(store.tenants):
            # Saved and loaded: a cast of the model would round its rotary frequencies too.
            rounded = helpers.load(
                helpers.save(oracles[i].to(torch.bfloat16), tmp_path / f"rounded {i}"),
                torch.bfloat16,
            )
            allowed = np.abs(hf_logits(rounded, rows) - exact[i]).mean()
            error = np.abs(engine.logits(name, rows) - exact[i]).mean()
            assert error <= 1.5 * allowed, (name, error, allowed)
    with load_engine(store, dtype="float32") as engine:
        assert_close(engine.logits("b", rows), exact[1])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_residual_bytes_are_counted_and_stay_packed(
    family: Family, tmp_path: Path, way: dict[str, Any]
) -> None:
    plain = helpers.build_round_robin(tmp_path / "plain", family.paths)
    store = prepared(tmp_path / "store", family.paths, "several parts")
    assert store.residual_bytes > 0
    with load_engine(plain, **way) as without, load_engine(store, **way) as engine:
        held = engine.stats()["residual_bytes"]
        assert without.stats()["residual_bytes"] == 0
        assert engine.stats()["pool_bytes"] == without.stats()["pool_bytes"]
        pool = engine._require_backend().pool  # type: ignore[attr-defined]
        if isinstance(pool, KernelPool):  # sign parts are padded to whole blocks of 64 outputs
            found = [layer.records for layer in pool.residuals.layers]
            assert store.residual_bytes <= held <= 3 * store.residual_bytes
        else:
            found = [item.data for item in pool.residuals.items]
            assert held == store.residual_bytes
        assert sum(data.numel() for data in found) == held
        assert {data.dtype for data in found} == {torch.uint8}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("slots", [3, None])
@pytest.mark.parametrize(
    "way", [{"dtype": "float32"}, {"dtype": "bfloat16", "experts": "grouped"}], ids=str
)
def test_cuda(family: Family, tmp_path: Path, slots: int | None, way: dict[str, Any]) -> None:
    store = prepared(tmp_path / "store", family.paths, "several parts", slots=slots)
    if way["dtype"] == "float32":
        check(store, family.models, [{"device": "cuda", "spare_slots": 2} | way], (9, 1, 17))
        return
    rows = helpers.prompts(0, [40])
    with load_engine(store, device="cuda", spare_slots=2, **way) as engine:
        for i, name in enumerate(store.tenants):
            exact = hf_logits(helpers.oracle_of_store(store, family.models, i), rows)
            assert np.abs(engine.logits(name, rows) - exact).mean() <= 0.05 * np.abs(exact).mean()
