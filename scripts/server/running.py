"""The answers of one HTTP request: generated at once, measured, and given up when their reader goes
away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from starlette.types import Receive

from common.sampling_params import SamplingParams
from common.serving.request import Generation, Output
from scripts.server.answer_shapes import RequestMetrics
from scripts.server.errors import ClientGoneError
from scripts.server.service import Service


@dataclass(frozen=True)
class Job:
    """One answer to generate. deadline_s: seconds from now."""

    tenant: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str = ""


class Clock:
    """When an answer's tokens came, on the server's clock, from the arrival of the HTTP request
    on."""

    def __init__(self, service: Service, tenant: str, arrived_at: float):
        self._service, self._tenant, self._arrived_at = service, tenant, arrived_at
        self.first_at: float | None = None
        self.last_at = arrived_at
        self.tokens = 0
        self.generation: Generation | None = None

    def see(self, output: Output) -> None:
        """Measure what came."""
        metrics, name = self._service.metrics, self._tenant
        if output.token_ids:
            now = time.perf_counter()
            if self.first_at is None:
                self.first_at = now
                first_s = now - self._arrived_at
                metrics.first_token.labels(name).observe(first_s)
                self._service.window.add(name, len(output.token_ids), first_s=first_s)
            else:
                gap_s = now - self.last_at
                metrics.between_tokens.labels(name).observe(gap_s)
                self._service.window.add(name, len(output.token_ids), gap_s=gap_s)
            self.last_at = now
            self.tokens += len(output.token_ids)
        if output.generation is not None:
            self.generation = output.generation
            timings = output.generation.timings
            metrics.queued.labels(name).observe(timings.queued)
            if self.first_at is not None:
                metrics.whole.labels(name).observe(self.last_at - self._arrived_at)
                metrics.prefill.labels(name).observe(max(0.0, timings.ttft - timings.queued))
                metrics.decode.labels(name).observe(self.last_at - self.first_at)

    @property
    def waited_s(self) -> float:
        return 0.0 if self.generation is None else self.generation.timings.queued


class Run:
    """Generates all answers of a request; iterate over it for (number of the answer, output) as
    they come.

    Use as an async context manager: leaving it cancels what still runs and frees its caches.
    """

    def __init__(
        self,
        service: Service,
        jobs: Sequence[Job],
        arrived_at: float,
        receive: Receive,
        streamed: bool,
    ):
        """streamed: whether outputs go to the client as they come."""
        self._service, self._jobs, self._receive = service, jobs, receive
        self._streamed = streamed
        self._arrived_at = arrived_at
        self._queue: asyncio.Queue[tuple[int, Output] | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.clocks = [Clock(service, job.tenant, arrived_at) for job in jobs]
        self._unfinished = len(jobs)

    async def __aenter__(self) -> Run:
        if self._service.cancelled is not None:
            raise self._service.cancelled
        self._service.runs.add(self)
        self._tasks = [asyncio.create_task(self._generate(i)) for i in range(len(self._jobs))]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._service.runs.discard(self)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self, reason: Exception) -> None:
        """Make the reader of this run meet an error, and generate no more."""
        self._queue.put_nowait(reason)
        for task in self._tasks:
            task.cancel()

    def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        """Raises what the engine raised for any of the answers, or ClientGoneError."""
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        if item[1].generation is not None:
            self._unfinished -= 1
        return item

    async def _generate(self, index: int) -> None:
        job = self._jobs[index]
        try:
            outputs = self._service.require().generate(
                job.tenant,
                job.prompt,
                job.params,
                priority=job.priority,
                deadline_s=job.deadline_s,
                cache_salt=job.cache_salt,
                streamed=self._streamed,
            )
            async with aclosing(cast(AsyncGenerator[Output], outputs)):
                async for output in outputs:
                    self.clocks[index].see(output)
                    self._queue.put_nowait((index, output))
        except Exception as error:
            self._queue.put_nowait(error)

    async def _watch(self) -> None:
        """Notice that the connection was closed, which is the only thing that can still be
        received."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(ClientGoneError())
        for task in self._tasks[:-1]:
            task.cancel()

    @property
    def generations(self) -> list[Generation]:
        """After the end: the answers, in order."""
        found = [clock.generation for clock in self.clocks]
        assert all(found), "not at its end"
        return [g for g in found if g is not None]

    def metrics(self) -> RequestMetrics:
        """Of all answers together, so far."""
        started = [c for c in self.clocks if c.first_at is not None]
        if not started:
            return RequestMetrics()
        first = min(c.first_at for c in started if c.first_at is not None)
        last = max(c.last_at for c in started)
        tokens = sum(c.tokens for c in started)
        gaps = sum(c.tokens - 1 for c in started)
        between = sum(c.last_at - c.first_at for c in started if c.first_at is not None)
        working = last - self._arrived_at - min(c.waited_s for c in started)
        timings = [c.generation.timings for c in self.clocks if c.generation is not None]
        return RequestMetrics(
            time_to_first_token_ms=_ms(first - self._arrived_at),
            queue_time_ms=_ms(max(c.waited_s for c in started)),
            generation_time_ms=_ms(last - first),
            mean_itl_ms=_ms(between / gaps) if gaps else None,
            tokens_per_second=round(tokens / working, 3) if working > 0 else None,
            reconfiguration_ms=_ms(max((t.reconfiguration for t in timings), default=0.0)),
            expert_hits=sum(t.hits for t in timings),
            expert_misses=sum(t.misses for t in timings),
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
