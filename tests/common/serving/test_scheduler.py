"""Continuous batching across tenants, on a backend whose tokens tell whose they are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import (
    DeadlineError,
    EngineError,
    OverloadedError,
    SchedulerOptions,
    UnknownTenantError,
)
from common.serving.backend import Part, Step
from common.serving.engine import Engine
from common.serving.fake import FakeBackend, FakeStore, answer, fake_engine, next_token
from common.serving.request import Output, Request
from tests.common.serving.requests import TENANTS, check_integrity, finish, params
from tests.helpers import examples


@st.composite
def events(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Arrivals, cancellations, updates and steps in any order. Prompts begin alike, or go on from
    what was answered."""
    kinds = ["submit", "submit", "again", "step", "step", "step", "cancel", "update"]
    found: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 30))):
        kind = draw(st.sampled_from(kinds))
        if kind in ("submit", "again"):
            found.append(
                (
                    kind,
                    (
                        draw(st.sampled_from(TENANTS)),
                        draw(st.integers(0, 3)),
                        draw(st.integers(1, 40)),
                        draw(st.integers(1, 25)),
                        draw(st.integers(-1, 1)),
                        draw(st.sampled_from(["", "", "salt"])),
                        draw(st.sampled_from([None, None, None, 0, 2])),
                    ),
                )
            )
        else:
            found.append((kind, draw(st.integers(0, 5))))
    return found


@settings(max_examples=examples(150), deadline=None)
@given(
    events=events(),
    seqs=st.integers(1, 6),
    chunk=st.sampled_from([1, 3, 8, 64]),
    room=st.sampled_from([72, 96, 160, 10**6]),
    ready=st.integers(1, 4),
    interference=st.sampled_from([0.0, 0.1, math.inf]),
    caching=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_answer_is_what_it_would_be_alone(
    events: list[tuple[str, Any]],
    seqs: int,
    chunk: int,
    room: int,
    ready: int,
    interference: float,
    caching: bool,
    seed: int,
) -> None:
    """Arrivals, cancellations, switches, chunks, pauses, preemptions and blocks that are found
    again leave every answer as it is."""
    options = SchedulerOptions(
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, chunk),
        prefill_chunk=chunk,
        max_interference=interference,
    )
    engine, backend = fake_engine(
        TENANTS, options, room=room, ready=ready, enable_prefix_caching=caching
    )
    clock, compute = 0.0, backend.step

    def step(parts: Sequence[Part]) -> Step:
        nonlocal clock
        clock += 1 + 0.5 * len(parts)
        return compute(parts)

    with (
        mock.patch("common.serving.steps.time.perf_counter", lambda: clock),
        mock.patch.object(backend, "step", step),
        # So that floods are known as such in few steps.
        mock.patch.multiple("common.serving.step_times", FEWEST=4, EVERY=2),
        mock.patch.multiple("common.serving.flood", FEW=1),
    ):
        answer_all(engine, backend, events, seed)
    assert all(len(parts) <= seqs for parts in backend.steps)
    if interference == math.inf:
        assert not any(count["flood_steps"] for count in engine.stats()["tenants"].values())


def answer_all(
    engine: Engine, backend: FakeBackend, events: list[tuple[str, Any]], seed: int
) -> None:
    rng = random.Random(seed)
    asked: list[tuple[Request, list[int], list[Output]]] = []
    beginnings = [[rng.randrange(1, 97) for _ in range(30)] for _ in range(2)]
    for kind, what in events:
        if kind in ("submit", "again"):
            tenant, number, length, count, priority, salt, top = what
            prompt = [rng.randrange(1, 97) for _ in range(length)]
            if number < len(beginnings):
                prompt = (beginnings[number] + prompt)[:40]
            if kind == "again" and asked:
                before, theirs, _ = asked[number % len(asked)]
                prompt = [*theirs, *before.token_ids, *prompt][:45]
            outputs: list[Output] = []
            request = engine.submit(
                tenant,
                prompt,
                params(count, prompt_logprobs=top),
                priority=priority,
                cache_salt=salt,
                on_output=outputs.append,
            )
            asked.append((request, prompt, outputs))
        elif kind == "update":
            store: Any = FakeStore(TENANTS)
            engine.update(store)
        elif kind == "step":
            for _ in range(what):
                engine.step()
        elif asked:
            engine.cancel(asked[what % len(asked)][0])
    finish(engine)
    for request, prompt, outputs in asked:
        whole = answer(request.tenant, prompt, request.max_new_tokens)
        got = [t for o in outputs for t in o.token_ids]
        assert got == request.token_ids
        check_prompt_logprobs(request, outputs)
        if request.finish_reason == "abort":
            assert got == whole[: len(got)]
        else:
            assert got == whole
            assert request.finish_reason == ("stop" if whole[-1] == 0 else "length")
            assert [o.generation is not None for o in outputs] == [False] * (len(outputs) - 1) + [
                True
            ]
    assert backend.used == 0 and not backend._sequences
    check_integrity(backend.pool)
    counts = engine.stats()["tenants"].values()
    if not backend.pool.enable_prefix_caching:
        assert not any(count["prefix_cache_queries"] for count in counts)
    for count in counts:
        assert 0 <= count["prefix_cache_hits"] <= count["prefix_cache_queries"]


def check_prompt_logprobs(request: Request, outputs: list[Output]) -> None:
    """Those of the whole prompt, once, with the first token; none where nobody asked."""
    given = [o.prompt_logprobs for o in outputs if o.prompt_logprobs]
    if request.params.prompt_logprobs is None:
        assert given == [] and request.prompt_logprobs == []
        return
    if not request.token_ids:
        assert given == []
        return
    first, *others = given[0]
    assert len(given) == 1 and outputs[0].prompt_logprobs and first is None
    assert [t.token_id for t in others if t] == list(request.prompt[1:])
    for i, token in enumerate(others, 1):
        likely = next_token(request.tenant, request.prompt[:i])
        assert token and (token.rank == 1) == (token.token_id == likely)
        assert len(token.top) == request.params.prompt_logprobs
        assert all(top[0] == likely for top in token.top[:1])
    assert request.num_cached_tokens == 0


def test_new_requests_join_a_running_batch() -> None:
    engine, backend = fake_engine(TENANTS)
    first = engine.submit("a", [1] * 6, params(20, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.submit("b", [2] * 6, params(5, ignore_eos=True))
    engine.step()
    assert {name for name, _ in backend.steps[-1]} == {"a", "b"}
    finish(engine)
    assert first.token_ids == answer("a", [1] * 6, 20, ignore_eos=True)


def test_a_long_prompt_stalls_nobody() -> None:
    engine, backend = fake_engine(TENANTS, SchedulerOptions(prefill_chunk=16))
    engine.submit("a", [1] * 4, params(200, ignore_eos=True))
    engine.step()
    engine.submit("b", [2] * 320, params(1))
    begun = len(backend.steps)
    finish(engine)
    reading = [s for s in backend.steps[begun:] if any(p.read for _, p in s)]
    assert len(reading) == 20
    for step in reading:
        assert sum(p.read for _, p in step) <= 16
        assert ("a", 0) in [(name, p.read) for name, p in step]


def test_without_answers_under_way_prompts_are_read_whole_offline() -> None:
    engine, backend = fake_engine(TENANTS)
    out = engine.generate_batch([("a", [1] * 300), ("b", [2] * 300)], params(3, ignore_eos=True))
    assert [len(o.token_ids) for o in out] == [3, 3]
    assert [sum(p.read for _, p in s) for s in backend.steps] == [600, 0, 0]


def test_priority_and_deadline_order_a_tenants_own_requests() -> None:
    engine, _ = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=1))
    order: list[str] = []

    def ask(label: str, **more: Any) -> None:
        engine.submit(
            "a",
            [1],
            params(2),
            on_output=lambda o: order.append(label) if o.generation else None,
            **more,
        )

    ask("plain")
    ask("soon", deadline_s=1e6)
    ask("urgent", priority=-1)
    ask("later", priority=1, deadline_s=1.0)
    finish(engine)
    assert order == ["urgent", "soon", "plain", "later"]


def test_past_its_deadline_a_request_ends_and_frees_its_caches() -> None:
    engine, backend = fake_engine(TENANTS)
    outputs: list[Output] = []
    request = engine.submit(
        "a", [1], params(10**5, ignore_eos=True), deadline_s=0.02, on_output=outputs.append
    )
    finish(engine, 10**6)
    assert isinstance(request.error, DeadlineError) and "the deadline passed after" in str(
        request.error
    )
    assert outputs[-1].generation is not None and outputs[-1].generation.finish_reason == "abort"
    assert 0 < len(request.token_ids) < 10**5
    assert backend.used == 0
    assert engine.stats()["tenants"]["a"]["requests"]["deadline"] == 1


def test_memory_is_bounded_and_what_is_put_off_comes_back() -> None:
    options = SchedulerOptions(max_num_seqs=8)
    engine, _ = fake_engine(TENANTS, options, room=128)
    made = [
        engine.submit(n, [i + 1] * 10, params(60, ignore_eos=True)) for i, n in enumerate("abab")
    ]
    finish(engine)
    for i, request in enumerate(made):
        assert request.token_ids == answer(request.tenant, [i + 1] * 10, 60, ignore_eos=True)
    assert engine.stats()["preemptions"] > 0
    assert sum(r.preemptions for r in made) == engine.stats()["preemptions"]


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine, _ = fake_engine(TENANTS, room=64)
    with pytest.raises(
        ValueError, match=r"the prompt has 70 tokens, there is room for 64 of tenant 'a'.*shorten"
    ):
        engine.submit("a", [1] * 70, params(1))
    with pytest.raises(ValueError, match="fills the context of tenant 'a'"):
        engine.submit("a", [1] * 64, params(1))
    request = engine.submit("a", [1] * 60, params(100, ignore_eos=True))
    assert request.max_new_tokens == 4
    finish(engine)
    assert len(request.token_ids) == 4


def test_a_full_queue_refuses_and_says_how_many_wait() -> None:
    engine, _ = fake_engine(TENANTS, SchedulerOptions(max_queue=3, max_queue_per_tenant=2))
    engine.submit("a", [1], params(1))
    engine.submit("a", [1], params(1))
    with pytest.raises(OverloadedError, match="2 requests of tenant 'a' wait already") as caught:
        engine.submit("a", [1], params(1))
    assert caught.value.waiting == 2
    engine.submit("b", [1], params(1))
    with pytest.raises(OverloadedError, match="3 requests wait already"):
        engine.submit("c", [1], params(1))
    finish(engine)
    engine.submit("a", [1], params(1))


@pytest.mark.parametrize("ready", [1, 2, 3])
def test_few_reconfigurations_and_no_starvation(
    ready: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer tenants in use than have requests: turns of ten reconfigurations' length, and
    everybody is served."""
    clock = 0.0
    monkeypatch.setattr("common.serving.steps.time.perf_counter", lambda: clock)
    engine, backend = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=4), ready=ready)
    for name in TENANTS:
        for _ in range(80):
            engine.submit(name, [1] * 4, params(20, ignore_eos=True))
    for _ in range(1000):
        before = backend.reconfigurations
        engine.step()
        clock += 0.002 + 0.01 * (backend.reconfigurations - before)
    # A reconfiguration of 10 ms may take a tenth of the time.
    assert 4 <= backend.reconfigurations <= ready * (1 + clock / 0.1)
    served = {n: sum(name == n for s in backend.steps for name, _ in s) for n in TENANTS}
    assert min(served.values()) > 0.6 * max(served.values()), served


def test_the_next_tenant_is_prefetched_where_that_helps() -> None:
    engine, backend = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=4), ready=2)
    backend.prefetches = True
    for name in TENANTS:
        engine.submit(name, [1] * 4, params(20, ignore_eos=True))
    engine.step()
    assert (
        len({name for name, _ in backend.steps[0]}) == 1
    )  # one place is kept for the tenant that comes next
    assert backend.prefetched and backend.prefetched[0] != backend.steps[0][0][0]
    finish(engine)


def test_a_retired_tenant_finishes_what_it_has() -> None:
    engine, _ = fake_engine(TENANTS)
    request = engine.submit("a", [1], params(5, ignore_eos=True))
    assert not engine.retire("a")
    with pytest.raises(UnknownTenantError):
        engine.submit("a", [1], params(1))
    assert "a" not in engine.tenants
    finish(engine)
    assert engine.retire("a") and request.finish_reason == "length"
    engine.reinstate("a")
    engine.submit("a", [1], params(1))


def test_a_failed_step_ends_its_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, backend = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=1))
    outputs: list[Output] = []
    bad = engine.submit("a", [1], params(5), on_output=outputs.append)
    good = engine.submit("b", [1], params(5, ignore_eos=True))
    step = backend.step
    monkeypatch.setattr(backend, "step", lambda parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(backend, "step", step)
    finish(engine)
    assert isinstance(bad.error, EngineError) and "ZeroDivisionError" in str(bad.error)
    assert outputs[-1].generation is not None
    assert good.token_ids == answer("b", [1], 5, ignore_eos=True)
