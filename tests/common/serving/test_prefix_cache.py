"""What requests find in the cache, on a backend whose tokens tell what a sequence has read."""

from __future__ import annotations

from typing import Any

import pytest

from common import SchedulerOptions
from common.serving.block_pool import BlockPool, Prefix
from common.serving.engine import Engine
from common.serving.fake import FakeBackend, FakeStore, answer, fake_engine
from tests.common.serving.requests import TENANTS, finish, params

PROMPT = [5, 6, 7, 8] * 6 + [9]  # six blocks and a token


def read(backend: FakeBackend) -> list[int]:
    """Tokens that each step read."""
    return [sum(part.read for _, part in parts) for parts in backend.steps]


def counts(engine: Engine, tenant: str) -> tuple[int, int]:
    found = engine.stats()["tenants"][tenant]
    return found["prefix_cache_queries"], found["prefix_cache_hits"]


def test_a_beginning_is_computed_once_and_one_token_always() -> None:
    engine, backend = fake_engine(TENANTS)
    for prompt, cached in ((PROMPT, 0), (PROMPT, 24), ([*PROMPT[:24]], 20), ([*PROMPT, 3], 24)):
        backend.steps.clear()
        found = engine.generate("a", prompt, params(3))
        assert list(found.token_ids) == answer("a", prompt, 3)
        assert found.num_cached_tokens == cached
        assert sum(read(backend)) == len(prompt) - cached
    assert counts(engine, "a") == (25 + 25 + 24 + 26, 24 + 20 + 24)


def test_answers_are_found_as_well() -> None:
    engine, _ = fake_engine(TENANTS)
    first = engine.generate("a", PROMPT, params(12, ignore_eos=True))
    more = [*PROMPT, *first.token_ids, 3, 4]
    again = engine.generate("a", more, params(3))
    # The last token of an answer was not read.
    assert again.num_cached_tokens == (25 + 11) // 4 * 4
    assert list(again.token_ids) == answer("a", more, 3)


def test_requests_that_come_together_wait_for_their_common_beginning() -> None:
    engine, backend = fake_engine(TENANTS, SchedulerOptions(prefill_chunk=16))
    asked = [engine.submit("a", [*PROMPT, i], params(4, ignore_eos=True)) for i in range(1, 4)]
    other = engine.submit("b", PROMPT, params(4, ignore_eos=True))
    finish(engine)
    for i, request in enumerate(asked, 1):
        assert request.token_ids == answer("a", [*PROMPT, i], 4, ignore_eos=True)
    assert other.token_ids == answer("b", PROMPT, 4, ignore_eos=True)
    assert [r.num_cached_tokens for r in asked] == [0, 24, 24]
    assert other.num_cached_tokens == 0
    assert read(backend)[:2] == [26 + 25, 2 + 2]


def test_only_what_is_computed_is_charged_and_takes_of_a_steps_room() -> None:
    options = SchedulerOptions(max_num_batched_tokens=8, max_num_seqs=8)
    engine, backend = fake_engine(TENANTS, options)
    engine.generate("a", PROMPT, params(1))
    before = engine._steps.scheduler.served("a")
    engine.generate("b", [1], params(1))
    backend.steps.clear()
    engine.generate_batch([("a", PROMPT), ("a", [*PROMPT[:24], 3])], params(1))
    assert read(backend) == [2]
    assert engine._steps.scheduler.served("a") == before + 2 + 2 * 4.0


def test_a_request_that_was_put_off_finds_its_blocks_again() -> None:
    engine, backend = fake_engine(TENANTS, room=100, block=4)
    asked = [
        engine.submit(t, [i + 1] * 16, params(60, ignore_eos=True))
        for i, t in enumerate(("a", "b"))
    ]
    finish(engine)
    given_up = [r for r in asked if r.preemptions]
    assert given_up
    for i, request in enumerate(asked):
        assert request.token_ids == answer(request.tenant, [i + 1] * 16, 60, ignore_eos=True)
        assert request.num_cached_tokens == 0, "what was its own does not count"
    computed = sum(read(backend)) - 2 * 16
    assert 0 < computed < 30, "the prompt and the first tokens of the answer were still there"


def test_blocks_that_nobody_has_are_free_for_others() -> None:
    engine, backend = fake_engine(TENANTS, room=40, block=4)
    for i in range(1, 9):
        prompt = [i] * 30
        assert list(engine.generate("a", prompt, params(5)).token_ids) == answer("a", prompt, 5)
    assert engine.stats()["preemptions"] == 0
    assert backend.used == 0
    stats = engine.stats()
    assert 0 < stats["kv_cache_cached_bytes"] <= 40 and stats["kv_cache_used_bytes"] == 0


def test_tenants_and_salts_find_nothing_of_one_another() -> None:
    engine, _ = fake_engine(TENANTS)
    asked = [(t, salt) for t in TENANTS for salt in ("", "x", "y")]
    for tenant, salt in asked:
        request = engine.submit(tenant, PROMPT, params(3), cache_salt=salt)
        finish(engine)
        assert request.num_cached_tokens == 0
        assert request.token_ids == answer(tenant, PROMPT, 3)
    again = engine.submit("b", PROMPT, params(3), cache_salt="x")
    finish(engine)
    assert again.num_cached_tokens == 24


def update(engine: Engine) -> None:
    store: Any = FakeStore(TENANTS)
    engine.update(store)


def test_nothing_of_before_an_update_is_found() -> None:
    engine, _ = fake_engine(TENANTS)
    engine.generate("a", PROMPT, params(3))
    runs = engine.submit("a", [*PROMPT, 3], params(12, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert runs.num_cached_tokens == 24
    update(engine)
    found = engine.generate("a", PROMPT, params(3))
    assert found.num_cached_tokens == 0 and list(found.token_ids) == answer("a", PROMPT, 3)
    finish(engine)
    assert runs.token_ids == answer("a", [*PROMPT, 3], 12, ignore_eos=True)
    # What it computed before the update, or behind that, is not left for others.
    more = [*PROMPT, 3, *runs.token_ids, 4]
    assert engine.generate("a", more, params(3)).num_cached_tokens == 24


@pytest.mark.parametrize("fault", ["tenant", "version"])
def test_a_pool_that_mixed_them_up_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The tests above see a wrong answer where blocks of others are read."""
    right = BlockPool.prefix

    def wrong(self: BlockPool, tenant: str, salt: str = "") -> Prefix | None:
        return right(self, "everybody", salt)

    if fault == "tenant":
        monkeypatch.setattr(BlockPool, "prefix", wrong)
    else:
        monkeypatch.setattr(BlockPool, "forget", lambda self: None)
    engine, _ = fake_engine(TENANTS)
    engine.generate("a", PROMPT, params(3))
    update(engine)
    found = engine.generate("b" if fault == "tenant" else "a", PROMPT, params(3))
    if fault == "tenant":
        engine.generate("b", PROMPT, params(3))
        found = engine.generate("c", PROMPT, params(3))
    assert found.num_cached_tokens == 24
    assert list(found.token_ids) != answer(found.tenant, PROMPT, 3)


def test_switched_off_all_is_computed() -> None:
    engine, backend = fake_engine(TENANTS, enable_prefix_caching=False)
    for _ in range(2):
        found = engine.generate("a", PROMPT, params(3))
        assert found.num_cached_tokens == 0 and list(found.token_ids) == answer("a", PROMPT, 3)
    engine.generate_batch([("a", PROMPT)] * 2, params(3))
    assert sum(read(backend)) == 4 * 25
    assert counts(engine, "a") == (0, 0)


def test_an_observer_sees_all_tokens_and_leaves_nothing() -> None:
    engine, backend = fake_engine(TENANTS)
    engine.generate("a", PROMPT, params(1))
    seen = []

    def observer(_: str, __: int, x: Any, *___: Any) -> None:
        seen.append(len(x))

    engine.observe(observer)
    assert engine.generate("a", PROMPT, params(1)).num_cached_tokens == 0
    assert sum(seen) == 25
    engine.generate("b", PROMPT, params(1))
    runs = engine.submit("a", [*PROMPT, 3], params(12, ignore_eos=True))
    engine.step()
    engine.observe(None)
    finish(engine)
    assert engine.generate("b", PROMPT, params(1)).num_cached_tokens == 0
    more = [*PROMPT, 3, *runs.token_ids]
    assert engine.generate("a", more, params(1)).num_cached_tokens == 24
    assert backend.used == 0
