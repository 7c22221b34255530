"""Keys and values that are found again: answers are those of Hugging Face's models all the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common import EngineError, SamplingParams, SchedulerOptions, load_engine
from common.build.scoring import log_softmax
from common.serving.block_pool import BlockPool
from common.serving.engine import Engine
from common.store import Store
from tests import helpers
from tests.conftest import Family
from tests.families import tenants
from tests.helpers import hf_greedy, prompts, rest_slow
from torch_engine.layers.cache import BLOCK

WAYS: list[dict[str, Any]] = [
    {},
    {"products": "plain"},
    {"experts": "grouped", "products": "plain", "spare_slots": 2},
]


def new(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **more)


def counts(engine: Engine, tenant: str) -> tuple[int, int]:
    found = engine.stats()["tenants"][tenant]
    return found["prefix_cache_queries"], found["prefix_cache_hits"]


@pytest.fixture(scope="module")
def missing(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three tenants; positions without a copy."""
    return helpers.build_round_robin(
        tmp_path_factory.mktemp("prefix") / "store", family.paths, slots=5
    )


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_common_beginning_is_computed_once_for_each_tenant(
    family: Family, missing: Store, options: dict[str, Any]
) -> None:
    (same,) = prompts(0, [50])
    with load_engine(missing, **options) as engine:
        for i, name in enumerate(family.names):
            oracle = helpers.oracle(family.models, i, missing.plan)
            for turn, end in enumerate(prompts(1, [3, 1, 17])):
                prompt = [*same, *end]
                found = engine.generate(name, prompt, new(4))
                assert list(found.token_ids) == hf_greedy(oracle, prompt, 4)
                assert found.num_cached_tokens == (48 if turn else 0)
                computed = len(prompt) - found.num_cached_tokens + 3
                assert found.timings.hits + found.timings.misses == computed * 2 * 2
            assert counts(engine, name) == (3 * 50 + 21, 2 * 48)


def test_answers_of_one_prompt_share_its_blocks(family: Family, missing: Store) -> None:
    (prompt,) = prompts(2, [4 * BLOCK + 1])
    name, oracle = family.names[0], helpers.oracle(family.models, 0, missing.plan)
    with load_engine(missing) as engine:
        asked = [engine.submit(name, prompt, new(20)) for _ in range(4)]
        for _ in range(3):
            engine.step()
        one = engine._require_backend().cache.block_bytes  # type: ignore[attr-defined]
        assert engine.stats()["kv_cache_used_bytes"] == (4 + 4) * one
        while engine.step():
            pass
        assert engine.stats()["kv_cache_used_bytes"] == 0
    for i, request in enumerate(asked):
        assert request.token_ids == hf_greedy(oracle, prompt, 20)
        assert request.num_cached_tokens == (4 * BLOCK if i else 0)


def other_plan(tmp_path: Path, family: Family) -> tuple[Store, Store]:
    """The same tenants, served by copies of different owners."""
    made = [
        helpers.build_round_robin(tmp_path / "first", family.paths),
        helpers.build_round_robin(tmp_path / "second", dict(reversed(family.paths.items()))),
    ]
    return made[0], made[1]


@pytest.mark.parametrize("forgets", [True, False])
def test_a_tenant_with_another_plan_finds_nothing_of_before(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    first, second = other_plan(tmp_path, family)
    (prompt,) = prompts(3, [40])
    asked = new(3, logprobs=0)
    with load_engine(second) as fresh:
        expected = [p.logprob for p in fresh.generate(family.names[0], prompt, asked).logprobs]
    if not forgets:  # so that it is seen what this test would find
        monkeypatch.setattr(BlockPool, "forget", lambda self: None)
    with load_engine(first) as engine:
        assert engine.generate(family.names[0], prompt, asked).num_cached_tokens == 0
        engine.update(second)
        found = engine.generate(family.names[0], prompt, asked)
    assert found.num_cached_tokens == (0 if forgets else 32)
    error = max(abs(a.logprob - b) for a, b in zip(found.logprobs, expected, strict=True))
    assert (error < 1e-4) == forgets, error


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("seed", rest_slow(range(4)))
def test_random_schedules_with_updates(
    family: Family, tmp_path: Path, options: dict[str, Any], seed: int
) -> None:
    """Requests that begin alike come together, are cancelled and preempted, and tenants join."""
    rng = random.Random(seed)
    names = family.names
    two = helpers.build_round_robin(tmp_path / "two", {n: family.paths[n] for n in names[:2]})
    three = helpers.build_round_robin(tmp_path / "three", family.paths, slots="all")
    own = helpers.build_round_robin(
        tmp_path / "own", {n: family.paths[n] for n in names[:2]}, slots="all"
    )
    beginnings = prompts(seed, [40, 33])
    scheduler = SchedulerOptions(max_num_seqs=6, max_num_batched_tokens=64, prefill_chunk=24)
    with load_engine(two, scheduler=scheduler, **options) as engine:
        pool = engine._require_backend().cache.pool  # type: ignore[attr-defined]
        pool._empty[:] = pool._empty[:14]
        for name in names[:2]:
            engine.generate(name, beginnings[0], new(2))
        engine.update(own)  # what was computed with others' copies is of no use now
        made = []
        for turn in range(10):
            if turn == 6:
                engine.update(three)
            name = names[rng.randrange(3 if turn >= 6 else 2)]
            row = [*rng.choice(beginnings), *prompts(rng.randrange(3), [rng.choice([1, 9])])[0]]
            for _ in range(rng.choice([1, 1, 3])):
                made.append((name, row, engine.submit(name, row, new(rng.randrange(1, 20)))))
            for _ in range(rng.randrange(5)):
                engine.step()
            if rng.random() < 0.3:
                engine.cancel(rng.choice(made)[2])
        while engine.step():
            pass
        assert pool.free == 14
        assert sum(counts(engine, name)[1] for name in names) > 0
    for name, row, request in made:
        expected = hf_greedy(family.models[names.index(name)], row, request.max_new_tokens)
        assert request.token_ids == expected[: len(request.token_ids)]
        assert request.finish_reason == "abort" or len(request.token_ids) == len(expected)


def test_kernels_of_decode_steps_read_shared_blocks(tmp_path: Path) -> None:
    """In Triton's interpreter: tables of rows that share blocks."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("runs without a card")
    sizes = {"hidden_size": 24, "intermediate_size": 20}
    models, paths = tenants("mixtral", tmp_path, num_hidden_layers=1, **sizes)
    store = helpers.build_round_robin(tmp_path / "store", paths)
    (same,) = prompts(5, [2 * BLOCK])
    ends = prompts(6, [1, 3, 1])
    oracles = [helpers.oracle(models, i, store.plan) for i in range(2)]
    options = {"device": "cpu", "experts": "grouped", "products": "plain"}
    with load_engine(store, decode="graph", **options) as engine:
        asked = [(name, [*same, *end]) for name in paths for end in ends]
        answers = engine.generate_batch(asked, new(3))
        assert engine.stats()["decode_graph_steps"] > 0
    assert [a.num_cached_tokens for a in answers] == [0, 32, 32] * 2
    for (name, prompt), found in zip(asked, answers, strict=True):
        oracle = oracles[list(paths).index(name)]
        assert list(found.token_ids) == hf_greedy(oracle, prompt, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"ready_tenants": 1}], ids=str)
def test_cuda_finds_beginnings(family: Family, missing: Store, options: dict[str, Any]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    (same,) = prompts(0, [50])
    asked = [(name, [*same, *end]) for name in family.names for end in prompts(1, [3, 1])]
    with load_engine(missing, device="cuda", **options) as engine:
        for turn in range(2):
            answers = engine.generate_batch(asked, new(4))
            for (name, prompt), found in zip(asked, answers, strict=True):
                oracle = helpers.oracle(family.models, family.names.index(name), missing.plan)
                assert list(found.token_ids) == hf_greedy(oracle, prompt, 4)
            assert turn == 0 or all(a.num_cached_tokens == 48 for a in answers)
        scored = engine.generate_batch(asked, new(2, prompt_logprobs=1))
    for (name, prompt), found in zip(asked, scored, strict=True):
        oracle = helpers.oracle(family.models, family.names.index(name), missing.plan)
        expected = log_softmax(helpers.hf_logits(oracle, [prompt])[0])
        for i, token in enumerate(found.prompt_logprobs[1:]):
            assert token is not None
            assert token.logprob == pytest.approx(expected[i, token.token_id], abs=1e-3)


def test_it_can_be_switched_off(family: Family, missing: Store) -> None:
    (prompt,) = prompts(0, [50])
    with load_engine(missing, enable_prefix_caching=False) as engine:
        for _ in range(2):
            assert engine.generate(family.names[0], prompt, new(2)).num_cached_tokens == 0
        assert counts(engine, family.names[0]) == (0, 0)
        assert engine.stats()["kv_cache_cached_bytes"] == 0
    for wrong in (1, "yes", None):
        with pytest.raises(EngineError, match="enable_prefix_caching is"):
            load_engine(missing, enable_prefix_caching=wrong)


def test_logits_are_those_without_it(family: Family, missing: Store) -> None:
    (prompt,) = prompts(4, [70])
    found = []
    for caching in (True, False):
        with load_engine(missing, enable_prefix_caching=caching) as engine:
            for _ in range(2):
                one = engine.generate(family.names[1], prompt, new(6, logprobs=5))
            found.append(one)
    assert [f.num_cached_tokens for f in found] == [64, 0]
    assert found[0].token_ids == found[1].token_ids
    for ours, theirs in zip(found[0].logprobs, found[1].logprobs, strict=True):
        np.testing.assert_allclose([p for _, p in ours.top], [p for _, p in theirs.top], atol=1e-4)
