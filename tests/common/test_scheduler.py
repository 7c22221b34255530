"""Continuous batching across tenants, on a backend whose tokens tell whose they are."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import (
    DeadlineError,
    EngineError,
    OverloadedError,
    SamplingParams,
    SchedulerOptions,
    UnknownTenantError,
)
from common.serving.backend import Part, Step
from common.serving.engine import Engine
from common.serving.fake import FakeBackend, answer, fake_engine
from common.serving.request import Output, Request
from tests.helpers import examples, rest_slow

TENANTS = ("a", "b", "c", "d")


def params(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **more)


def finish(engine: Engine, most: int = 10_000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError(f"not done after {most} steps")


@st.composite
def events(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Arrivals, cancellations and steps in any order."""
    found: list[tuple[str, Any]] = []
    for _ in range(draw(st.integers(1, 30))):
        kind = draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel"]))
        if kind == "submit":
            length = draw(st.integers(1, 40))
            found.append(
                (
                    kind,
                    (
                        draw(st.sampled_from(TENANTS)),
                        length,
                        draw(st.integers(1, 25)),
                        draw(st.integers(-1, 1)),
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
    seed=st.integers(0, 9),
)
def test_every_answer_is_what_it_would_be_alone(
    events: list[tuple[str, Any]],
    seqs: int,
    chunk: int,
    room: int,
    ready: int,
    interference: float,
    seed: int,
) -> None:
    """Arrivals, cancellations, switches, chunks, pauses and preemptions leave every answer as it
    is."""
    options = SchedulerOptions(
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, chunk),
        prefill_chunk=chunk,
        max_interference=interference,
    )
    engine, backend = fake_engine(TENANTS, options, room=room, ready=ready)
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
    for kind, what in events:
        if kind == "submit":
            tenant, length, count, priority = what
            prompt = [rng.randrange(1, 97) for _ in range(length)]
            outputs: list[Output] = []
            request = engine.submit(
                tenant, prompt, params(count), priority=priority, on_output=outputs.append
            )
            asked.append((request, prompt, outputs))
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
        if request.finish_reason == "abort":
            assert got == whole[: len(got)]
        else:
            assert got == whole
            assert request.finish_reason == ("stop" if whole[-1] == 0 else "length")
            assert [o.generation is not None for o in outputs] == [False] * (len(outputs) - 1) + [
                True
            ]
    assert backend.used == 0 and not backend._rows


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


def test_places_are_shared_by_weight_and_limits_hold() -> None:
    weights, limits = {"a": 2.0}, {"d": 1}
    options = SchedulerOptions(
        max_num_seqs=12, prefill_chunk=64, weights=weights, limits=limits, max_interference=math.inf
    )
    engine, backend = fake_engine(TENANTS, options)
    for name in TENANTS:
        for _ in range(20):
            engine.submit(name, [1, 2], params(30, ignore_eos=True))
    for _ in range(40):
        engine.step()
    counts = [
        {n: sum(name == n for name, _ in step) for n in TENANTS} for step in backend.steps[20:40]
    ]
    for count in counts:
        assert sum(count.values()) == 12 and count["d"] == 1
        assert count["a"] in (5, 6) and {count["b"], count["c"]} <= {2, 3}


def test_a_flood_does_not_keep_another_tenant_waiting() -> None:
    engine, backend = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=8, prefill_chunk=32))
    for _ in range(200):
        engine.submit("a", [1] * 30, params(30, ignore_eos=True))
    for _ in range(50):
        engine.step()
    begun = len(backend.steps)
    late = engine.submit("b", [2] * 30, params(30, ignore_eos=True))
    while not late.done:
        engine.step()
    # One step to read the prompt, one for each token after the first: the flood costs it nothing.
    assert len(backend.steps) - begun == 30


@dataclasses.dataclass
class Flooded:
    """An engine whose steps take 1 s and `row_s` more for each row, `tenant_s` for each tenant;
    `a`, `b` and `c` have few requests at a time, `d` floods it after 200 steps.

    asked, rows: each tenant's unfinished requests before each of the steps, and its rows in it.
    """

    engine: Engine
    backend: FakeBackend
    asked: list[dict[str, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def run(
        cls,
        monkeypatch: pytest.MonkeyPatch,
        row_s: float,
        steps: int = 600,
        rate: float = 0.15,
        tenant_s: float = 0.0,
        **options: Any,
    ) -> Flooded:
        chosen = SchedulerOptions(max_num_seqs=32, prefill_chunk=64, max_queue=10**6, **options)
        engine, backend = fake_engine(TENANTS, chosen)
        found = cls(engine, backend)
        clock, compute = 0.0, backend.step

        def step(parts: Sequence[Part]) -> Step:
            nonlocal clock
            tenants = {backend._rows[p.sequence].tenant for p in parts}
            clock += 1 + row_s * len(parts) + tenant_s * len(tenants)
            return compute(parts)

        monkeypatch.setattr("common.serving.steps.time.perf_counter", lambda: clock)
        monkeypatch.setattr(backend, "step", step)
        rng = random.Random(1)
        for i in range(steps):
            for name in TENANTS:
                if rng.random() < rate:
                    engine.submit(name, [1] * rng.randrange(4, 20), params(30, ignore_eos=True))
            if i == 200:
                found.ask("d", 1000)
            found.asked.append({n: len(engine._steps.scheduler.requests(n)) for n in TENANTS})
            engine.step()
        return found

    def ask(self, tenant: str, count: int) -> None:
        for _ in range(count):
            self.engine.submit(tenant, [1] * 8, params(30, ignore_eos=True))

    def steps(self, count: int, **how: Any) -> dict[str, int]:
        """Take so many; what the last one held."""
        for _ in range(count):
            self.engine._steps.step(**how)
        return self.rows[-1]

    @property
    def rows(self) -> list[dict[str, int]]:
        return [
            {n: sum(name == n for name, _ in step) for n in TENANTS} for step in self.backend.steps
        ]


@pytest.mark.parametrize("interference", [0.0, 0.1, 0.4])
def test_a_flood_gets_its_share_of_the_throughput_and_what_slows_the_others_little(
    monkeypatch: pytest.MonkeyPatch, interference: float
) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.05, max_interference=interference)
    after = list(zip(flood.asked, flood.rows, strict=True))[230:]
    seconds = tokens = alone = full = 0.0
    for asked, rows in after:
        assert all(rows[n] == asked[n] for n in "abc" if asked[n] <= 8), (
            "others wait for a flood's rows"
        )
        seconds += 1 + 0.05 * sum(rows.values())
        alone += 1 + 0.05 * (sum(rows.values()) - rows["d"])
        tokens += rows["d"]
        full += sum(rows.values()) == 32
    held = {n: flood.engine.stats()["tenants"][n]["flood_steps"] for n in TENANTS}
    assert held["d"] > 0.9 * len(after) and sum(held[n] for n in "abc") < 0.1 * held["d"]
    best = 32 / (1 + 0.05 * 32)
    share = tokens / seconds / best
    slower = seconds / alone - 1
    if interference == 0.4:  # takes more rows than its share does
        assert share > 0.35 and 0.33 < slower < 0.4
    else:
        assert share == pytest.approx(0.25, abs=0.02) and slower > 0.1 and not full


def test_a_flood_joins_few_steps_with_many_rows_where_tenants_cost_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a tenant has of its own is read once for all of its rows: with its share in every step
    it would pay more for that than for them."""
    monkeypatch.setattr("common.serving.demand.RECENT_S", math.inf)
    flood = Flooded.run(monkeypatch, row_s=0.05, tenant_s=0.5, rate=0.04, max_interference=0.0)
    after = [rows for rows in flood.rows[230:] if sum(rows.values()) > rows["d"]]
    joined = [rows["d"] for rows in after if rows["d"]]
    seconds = sum(
        1 + 0.5 * sum(map(bool, rows.values())) + 0.05 * sum(rows.values()) for rows in after
    )
    best = 32 / (1 + 0.5 * 4 + 0.05 * 32)
    assert sum(joined) / seconds == pytest.approx(0.25 * best, rel=0.15)
    assert 0.2 * len(after) < len(joined) < 0.8 * len(after)
    # At least half of what a step is longer by is rows: 0.5 s.
    assert 9 <= median(joined) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("row_s", rest_slow([0.0, 0.05]))
def test_what_rows_cost_is_found_out_where_a_flood_was_first(
    monkeypatch: pytest.MonkeyPatch, row_s: float
) -> None:
    """After many steps of one size nothing tells whether the others would be better off with
    smaller ones."""
    flood = Flooded.run(monkeypatch, row_s=row_s, steps=0)
    flood.ask("d", 5000)
    assert flood.steps(400)["d"] == 32
    begun = len(flood.rows)
    for i in range(400):
        if i % 4 == 0:
            flood.ask("abc"[i % 3], 1)
        flood.steps(1)
    places = [rows["d"] for rows in flood.rows[begun + 30 :]]
    if row_s:
        assert max(places) < 16 and sum(places) < 9 * len(places)
    else:  # few steps are small, so that one knows
        assert sum(places) > 0.9 * sum(
            32 - sum(r[n] for n in "abc") for r in flood.rows[begun + 30 :]
        )


def test_tenants_that_ask_for_more_than_their_shares_divide_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {"d": 2.0}
    flood = Flooded.run(monkeypatch, row_s=0.05, steps=300, max_interference=0.0, weights=weights)
    flood.ask("a", 500)
    begun = len(flood.rows)
    flood.steps(150)
    rows = flood.rows[begun + 10 :]
    a, d = (sum(r[n] for r in rows) for n in "ad")
    assert d / a == pytest.approx(2.0, rel=0.15)
    assert sum(sum(r.values()) for r in rows) < 31 * len(rows)


def test_who_has_most_of_a_traffic_that_the_device_can_bear_is_not_held_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A burst of one tenant beyond its share takes the places that it wants."""
    flood = Flooded.run(monkeypatch, row_s=0.05, steps=200, rate=0.05, max_interference=0.0)
    flood.ask("d", 14)
    rows = flood.steps(20)
    assert rows["d"] >= 12 and sum(rows.values()) == len(flood.engine._steps.scheduler.requests())


@pytest.mark.parametrize(
    "options", [{}, {"max_interference": math.inf}], ids=["rows cost nothing", "no bound"]
)
def test_a_flood_takes_every_free_place_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.05 if options else 0.0, **options)
    rows = [sum(rows.values()) for rows in flood.rows[220:]]
    # Where nothing is bound, a few smaller steps show that rows cost nothing.
    assert min(rows) == 32 if options else rows.count(32) > 0.9 * len(rows)


def test_alone_a_tenant_takes_every_place_whatever_rows_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.2, steps=300, max_interference=0.0)
    assert sum(flood.rows[-1].values()) < 32
    for request in [r for n in "abc" for r in flood.engine._steps.scheduler.requests(n)]:
        flood.engine.cancel(request)
    assert flood.steps(4)["d"] == 32


def test_offline_no_place_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.2, steps=300, max_interference=0.0)
    assert sum(flood.steps(1).values()) < 32
    assert sum(flood.steps(1, alone=True).values()) == 32


def test_shares_are_not_bounded_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every tenant at work all places are used, by weight."""
    weights = {"a": 3.0, "b": 0.5, "c": 1.5}
    flood = Flooded.run(monkeypatch, row_s=0.2, steps=300, max_interference=0.0, weights=weights)
    for name in "abc":
        flood.ask(name, 30)
    rows = flood.steps(10)
    assert sum(rows.values()) == 32
    assert all(abs(rows[n] - 32 * weights.get(n, 1.0) / 6) <= 1 for n in TENANTS), rows


def test_service_is_shared_by_tokens_not_by_requests() -> None:
    """Long answers of one tenant count for what they are: the tenant of short ones is served more
    often."""
    engine, backend = fake_engine(
        TENANTS,
        SchedulerOptions(max_num_seqs=1, max_num_batched_tokens=64, max_interference=math.inf),
    )
    for _ in range(30):
        engine.submit("a", [1] * 2, params(40, ignore_eos=True))
        engine.submit("b", [2] * 2, params(4, ignore_eos=True))
    for _ in range(400):
        engine.step()
    served = [sum(1 for s in backend.steps for name, p in s if name == n) for n in "ab"]
    assert abs(served[0] - 400 + served[1]) <= 1
    assert served[1] >= 110  # its thirty requests need 120


def test_an_idle_tenant_saves_up_no_service() -> None:
    engine, backend = fake_engine(
        TENANTS, SchedulerOptions(max_num_seqs=2, max_interference=math.inf)
    )
    for _ in range(50):
        engine.submit("a", [1] * 4, params(20, ignore_eos=True))
    for _ in range(300):
        engine.step()
    for _ in range(50):
        engine.submit("b", [2] * 4, params(20, ignore_eos=True))
    begun = len(backend.steps)
    for _ in range(100):
        engine.step()
    both = [{name for name, _ in s} for s in backend.steps[begun + 1 :]]
    assert all(names == {"a", "b"} for names in both)


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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[
            (n, v)
            for n in ("max_num_seqs", "max_num_batched_tokens", "max_queue")
            for v in (0, -1, True, "4", None)
        ],
        *[
            (n, 0)
            for n in ("prefill_chunk", "max_model_len", "max_queue_per_tenant", "default_limit")
        ],
        ("weights", {"a": 0}),
        ("limits", {"a": 0}),
        ("max_interference", -0.1),
        ("max_interference", math.nan),
        ("max_interference", True),
        ("switch_share", 0),
    ],
)
def test_bad_options_are_named(option: str, value: object) -> None:
    name = option if option not in ("weights", "limits") else f"the {option[:-1]} of tenant 'a'"
    with pytest.raises(EngineError, match=f"{name} is .*; give"):
        SchedulerOptions(**{option: value})


def test_options_that_contradict_each_other_or_name_strangers() -> None:
    with pytest.raises(EngineError, match="max_num_batched_tokens is 4, fewer than max_num_seqs"):
        SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=4)
    with pytest.raises(UnknownTenantError, match="no tenant 'x'"):
        fake_engine(TENANTS, SchedulerOptions(weights={"x": 1.0}))


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SchedulerOptions().max_queue = 1  # type: ignore[misc]


def test_the_fake_backend_keeps_its_callers_honest() -> None:
    backend = FakeBackend(TENANTS, room=8)
    with pytest.raises(AssertionError, match="empty"):
        backend.step([])


# Warming up.


@pytest.mark.parametrize(
    ("most", "backend"),
    [(1, {}), (6, {}), (8, {"ready": 1}), (16, {"room": 120}), (4, {"room": 8})],
    ids=str,
)
def test_warming_up_leaves_nothing_behind(most: int, backend: dict[str, Any]) -> None:
    engine, fake = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=most), **backend)
    engine.warm_up()
    assert fake.used == 0
    assert max(len(parts) for parts in fake.steps) <= most
    mixed = [parts for parts in fake.steps if len({tenant for tenant, _ in parts}) > 1]
    if not backend:
        # Every power of two that a step may hold, and all places at once; beside another tenant,
        # too.
        assert {1 << n for n in range(most.bit_length())} | {most} <= {
            len(parts) for parts in fake.steps
        }
        assert bool(mixed) == (most > 1)
    assert engine.stats()["tenants"]["a"]["generation_tokens"] == 0
    assert list(engine.generate("b", [3, 4], params(3)).token_ids) == answer("b", [3, 4], 3)
