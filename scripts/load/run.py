"""An open-loop load test: each request is sent at its time, whatever became of the others.

Every token is timed. Times begin when a request was to arrive, so waiting anywhere counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from scripts.load.traffic import Call, Trace

UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Piece:
    """Tokens that came together.

    reconfiguration_s: of this request, told with any one piece. total_tokens: how many came in all
    so far, from a system that knows no better for a piece than that it has tokens.
    """

    num_tokens: int
    reconfiguration_s: float = 0.0
    total_tokens: int | None = None


class System(Protocol):
    """What is tested: answers requests."""

    name: str

    def generate(self, call: Call) -> AsyncGenerator[Piece]:
        """The answer's pieces as they come. Closing it early cancels the request. Raises what goes
        wrong."""
        ...

    async def about(self) -> dict[str, Any]:
        """What is worth telling of it: load_s, resident_bytes, ..."""
        ...

    async def close(self) -> None: ...


@dataclass
class Record:
    """What became of a request, in seconds after the start of the test.

    pieces: (when, tokens) of each. total_tokens: where they are not what the pieces say. error:
    None if it was answered to its end.
    """

    call: Call
    sent_s: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)
    ended_s: float = 0.0
    reconfiguration_s: float = 0.0
    total_tokens: int | None = None
    error: str | None = UNFINISHED

    @property
    def num_tokens(self) -> int:
        return self.total_tokens or sum(n for _, n in self.pieces)

    @property
    def ttft_s(self) -> float:
        return self.pieces[0][0] - self.call.at_s

    @property
    def e2el_s(self) -> float:
        """Until the last token, or until the end if there was none."""
        return (self.pieces[-1][0] if self.pieces else self.ended_s) - self.call.at_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        return (self.e2el_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for (a, _), (b, _) in zip(self.pieces, self.pieces[1:], strict=False)]


async def run_trace(system: System, trace: Trace, drain_s: float) -> list[Record]:
    """Send all requests at their times, then wait for answers, at most so long after the last
    arrival.

    What is not done then is cancelled and stays `UNFINISHED`.
    """
    records = [Record(call) for call in trace.calls]
    start = time.perf_counter()
    tasks = []
    for record in records:
        await asyncio.sleep(max(0.0, start + record.call.at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(_answer(system, record, start)))
    end = start + trace.horizon_s + drain_s
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=max(0.0, end - time.perf_counter()))
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return records


async def _answer(system: System, record: Record, start: float) -> None:
    record.sent_s = time.perf_counter() - start
    try:
        async with aclosing(system.generate(record.call)) as pieces:
            async for piece in pieces:
                if piece.num_tokens:
                    record.pieces.append((time.perf_counter() - start, piece.num_tokens))
                record.reconfiguration_s += piece.reconfiguration_s
                record.total_tokens = piece.total_tokens or record.total_tokens
        record.error = None if record.pieces else "an answer without tokens"
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        record.ended_s = time.perf_counter() - start


async def capacity(
    system: System, calls: Sequence[Call], concurrency: int, seconds: float
) -> float:
    """Requests a second that a system answers if always `concurrency` of them are under way: where
    it saturates.

    Counted in tokens, from the first finished answer on, over the mean length of an answer. Waits
    twice `seconds` for that first one, at most.
    """
    numbers = count()
    tokens: list[tuple[float, int]] = []
    finished = asyncio.Event()

    async def worker() -> None:
        while True:
            call = calls[next(numbers) % len(calls)]
            async with aclosing(system.generate(call)) as pieces:
                async for piece in pieces:
                    tokens.append((time.perf_counter(), piece.num_tokens))
            finished.set()

    workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
    watch = asyncio.create_task(finished.wait())
    try:
        done, _ = await asyncio.wait(
            [watch, *workers], timeout=2 * seconds, return_when=asyncio.FIRST_COMPLETED
        )
        begun = time.perf_counter()
        if not done & set(workers):
            done, _ = await asyncio.wait(
                workers, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        for task in done & set(workers):
            task.result()  # workers end by their errors alone
        ended = time.perf_counter()
    finally:
        for task in (watch, *workers):
            task.cancel()
        await asyncio.gather(watch, *workers, return_exceptions=True)
    served = sum(n for at, n in tokens if begun < at <= ended)
    mean = sum(c.max_new_tokens for c in calls) / len(calls)
    return served / (ended - begun) / mean


async def warm_up(system: System, calls: Sequence[Call]) -> None:
    """Send requests all at once and wait for them: compilation, first touch of weights and caches.
    Raises errors."""

    async def one(call: Call) -> None:
        async with aclosing(system.generate(call)) as pieces:
            async for _ in pieces:
                pass

    await asyncio.gather(*(one(call) for call in calls))
