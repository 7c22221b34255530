"""An engine in its thread, driven from asyncio, over a backend whose tokens tell whose they are."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from common import (
    DeadlineError,
    EngineError,
    OverloadedError,
    RequestError,
    SamplingParams,
    SchedulerOptions,
)
from common.build.online import OnlineEngine
from common.serving.async_engine import MAX_FAILURES
from common.serving.fake import FakeBackend, answer, fake_engine
from common.serving.request import Request

TENANTS = ("a", "b", "c")


def params(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


class Made:
    """An OnlineEngine, its backend, and what its listeners heard."""

    def __init__(self, options: SchedulerOptions | None = None, **backend: Any):
        engine, self.backend = fake_engine(TENANTS, options, **backend)
        self.served = OnlineEngine(engine)
        self.finished: list[Request] = []
        self.served.on_finish(self.finished.append)

    async def tokens(self, tenant: str, prompt: list[int], count: int, **more: Any) -> list[int]:
        found: list[int] = []
        async for output in self.served.generate(tenant, prompt, params(count), **more):
            found += output.token_ids
        return found


@pytest.fixture
def made() -> Iterator[type[Made]]:
    everything: list[Made] = []

    class Kept(Made):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            everything.append(self)

    yield Kept
    for one in everything:
        one.served.close()
        assert not one.served.healthy


def slow(backend: FakeBackend, seconds: float) -> None:
    """Make every step take so long, so that something can happen meanwhile."""
    step = backend.step

    def slowly(parts: Any) -> Any:
        time.sleep(seconds)
        return step(parts)

    backend.step = slowly  # type: ignore[method-assign]


def test_many_at_once_get_their_own_answers(made: type[Made]) -> None:
    async def run() -> None:
        one = made(SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=16), room=400, ready=2)
        rng = random.Random(0)
        asked = [
            (rng.choice(TENANTS), [rng.randrange(1, 97) for _ in range(rng.randrange(1, 50))])
            for _ in range(60)
        ]
        got = await asyncio.gather(*(one.tokens(t, p, 1 + len(p) % 20) for t, p in asked))
        for (tenant, prompt), tokens in zip(asked, got, strict=True):
            assert tokens == answer(tenant, prompt, 1 + len(prompt) % 20, ignore_eos=True)
        assert len(one.finished) == 60
        load = await one.served.load()
        assert (load["running"], load["waiting"], load["kv_cache_used_bytes"]) == (0, 0, 0)
        stats = (await one.served.stats())["tenants"]
        assert sum(stats[t]["requests"]["length"] for t in TENANTS) == 60
        assert sum(stats[t]["generation_tokens"] for t in TENANTS) == sum(map(len, got))

    asyncio.run(run())


def test_who_goes_away_is_cancelled(made: type[Made]) -> None:
    async def run() -> None:
        one = made()
        slow(one.backend, 0.002)
        stream = one.served.generate("a", [1], params(10**5))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(one.tokens("b", [1], 10**5))
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        for _ in range(200):
            load = await one.served.load()
            if load["running"] == load["waiting"] == 0:
                break
            await asyncio.sleep(0.01)
        assert load["kv_cache_used_bytes"] == 0
        assert (await one.served.stats())["tenants"]["a"]["requests"]["abort"] == 1
        assert await one.tokens("c", [1], 3) == answer("c", [1], 3, ignore_eos=True)

    asyncio.run(run())


def test_errors_reach_the_asker(made: type[Made]) -> None:
    async def run() -> None:
        one = made(SchedulerOptions(max_num_seqs=1, max_queue=1))
        slow(one.backend, 0.002)
        with pytest.raises(RequestError, match="no tenant 'x'"):
            await one.tokens("x", [1], 1)
        with pytest.raises(RequestError, match="the prompt is empty"):
            await one.tokens("a", [], 1)
        with pytest.raises(RequestError, match=r"priority is 1\.5"):
            await one.tokens("a", [1], 1, priority=1.5)
        with pytest.raises(RequestError, match="deadline_s is 0"):
            await one.tokens("a", [1], 1, deadline_s=0)
        with pytest.raises(DeadlineError) as late:
            await one.tokens("a", [1], 10**5, deadline_s=0.05)
        assert late.value.generation is not None
        first = asyncio.create_task(one.tokens("a", [1], 200))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(one.tokens("a", [1], 2))
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError) as full:
            await one.tokens("b", [1], 1)
        assert full.value.retry_after_s is not None and 1 <= full.value.retry_after_s <= 60
        assert len(await first) == 200 and len(await second) == 2

    asyncio.run(run())


def test_one_bad_step_costs_its_requests_alone_and_many_stop_the_engine(made: type[Made]) -> None:
    async def run() -> None:
        one = made(SchedulerOptions(max_num_seqs=1))
        step = one.backend.step
        one.backend.step = lambda parts: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        with pytest.raises(EngineError, match=r"a step of the engine failed .*ZeroDivisionError"):
            await one.tokens("a", [1], 1)
        one.backend.step = step  # type: ignore[method-assign]
        assert one.served.healthy
        assert len(await one.tokens("a", [1], 5)) == 5
        one.backend.step = lambda parts: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        waiting = [asyncio.create_task(one.tokens("a", [1], 5)) for _ in range(MAX_FAILURES + 3)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(r, EngineError) for r in results)
        assert not one.served.healthy
        with pytest.raises(EngineError, match="the engine stopped"):
            await one.tokens("a", [1], 1)

    asyncio.run(run())


def test_draining_finishes_what_was_promised(made: type[Made]) -> None:
    async def run() -> None:
        one = made()
        slow(one.backend, 0.001)
        tasks = [asyncio.create_task(one.tokens(t, [1], 50)) for t in TENANTS]
        await asyncio.sleep(0.02)
        done = asyncio.create_task(one.served.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="about to stop"):
            await one.tokens("a", [1], 1)
        assert await done
        assert [len(t) for t in await asyncio.gather(*tasks)] == [50] * 3

    asyncio.run(run())


def test_a_drain_that_takes_too_long_can_be_cut(made: type[Made]) -> None:
    async def run() -> None:
        one = made()
        slow(one.backend, 0.002)
        task = asyncio.create_task(one.tokens("a", [1], 10**6))
        await asyncio.sleep(0.02)
        assert not await one.served.drain(0.05)
        one.served.cancel_all("the server stops")
        with pytest.raises(EngineError, match="the server stops"):
            await task

    asyncio.run(run())
