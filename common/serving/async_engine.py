"""An engine in a thread of its own, for asyncio: any number of requests at once, batched
continuously."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from common.errors import EngineError, MoetelError, OverloadedError
from common.sampling_params import SamplingParams
from common.serving.checks import Prompt
from common.serving.engine import GREEDY, Engine
from common.serving.request import Output, Request
from common.store import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Steps that fail one after another before the engine is given up; one that succeeds starts the
# count anew.
MAX_FAILURES = 3

# Answers a second over the last so many seconds tell how long a refused request should wait.
RATE_WINDOW_S = 30.0


class AsyncEngine:
    """Runs an `Engine`'s steps in a thread. All methods but `close` are for one asyncio event loop
    at a time.

    The thread alone touches the engine's requests, so what other threads want of it is left as a
    note for the time between two steps.
    """

    def __init__(self, engine: Engine):
        """Takes the engine over: `close` closes it."""
        self.engine = engine
        self._wake = threading.Condition()
        self._notes: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._draining = False
        self._failure: BaseException | None = None
        self._finished: deque[float] = deque()
        self._listeners: list[Callable[[Request], None]] = []
        self._changes = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name="moetel-engine", daemon=True)
        self._thread.start()

    # The thread.

    def _run(self) -> None:
        failures = 0
        while True:
            with self._wake:
                while not self._notes and not self._stopping and not self.engine.has_work:
                    self._wake.wait()
                if self._stopping:
                    return
                notes, self._notes = list(self._notes), deque()
            for note in notes:
                note()
            try:
                self.engine.step()
                failures = 0
            except Exception as error:
                # Its requests were told. What broke may be one request's doing; what breaks again
                # and again is not.
                logger.exception("a step of the engine failed")
                failures += 1
                if failures >= MAX_FAILURES:
                    self._give_up(error)
                    return

    def _give_up(self, error: BaseException) -> None:
        with self._wake:
            self._failure = error
            notes, self._notes = list(self._notes), deque()
        for note in notes:
            note()
        self.engine.fail_all(
            EngineError(f"the engine stopped after {MAX_FAILURES} failed steps in a row ({error})")
        )

    def _note(self, note: Callable[[], None]) -> None:
        with self._wake:
            self._notes.append(note)
            self._wake.notify()

    async def _between_steps(self, work: Callable[[], T]) -> T:
        """Run something in the engine's thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def note() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as e:
                error = e
            _tell(loop, settle, result, error)

        self._require_healthy()
        self._note(note)
        return await future

    def _require_healthy(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine stopped ({self._failure}); start it again")
        if self._stopping or not self._thread.is_alive():
            raise EngineError("this engine is closed; load it again with load_engine()")

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs."""
        return self._failure is None and not self._stopping and self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the engine is about to stop."""
        return self._draining

    # Requests.

    async def generate(
        self,
        tenant: str,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: str = "",
        streamed: bool = True,
    ) -> AsyncIterator[Output]:
        """What the tenant answers, as it comes; the last output holds the whole `Generation`.

        priority, deadline_s, cache_salt: as for `Engine.submit`. streamed: whether outputs are
            passed on at once; it matters to engines in other processes, which can be lost.
        Closing the iterator early, or cancelling the task that waits for it, cancels the request;
        its caches are free before the next step.

        Raises at the first output RequestError, OverloadedError or EngineError,
        and at any DeadlineError or EngineError.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[tuple[Output, Request]] = asyncio.Queue()
        self._require_healthy()
        if self._draining:
            raise OverloadedError(
                "the server is about to stop and takes no new requests; try another one", 0, 1.0
            )

        def send(output: Output) -> None:
            _tell(loop, outputs.put_nowait, (output, request))

        # Text becomes tokens in a worker thread: a long prompt would hold up all other streams of
        # this loop.
        request = await asyncio.to_thread(
            self.engine.check,
            tenant,
            prompt,
            params,
            priority=priority,
            deadline_s=deadline_s,
            cache_salt=cache_salt,
            on_output=send,
        )
        try:
            try:
                await self._between_steps(lambda: self.engine.enqueue(request))
            except OverloadedError as error:
                error.retry_after_s = self._retry_after_s(error.waiting)
                raise
            while True:
                output, _ = await outputs.get()
                if request.error is not None and output.generation is not None:
                    raise request.error
                yield output
                if output.generation is not None:
                    return
        finally:
            if request.done:
                self._finish(request)
            else:
                self._note(lambda: self.engine.cancel(request))

    def _finish(self, request: Request) -> None:
        self._finished.append(time.monotonic())
        for listener in self._listeners:
            listener(request)

    def on_finish(self, listener: Callable[[Request], None]) -> None:
        """Call `listener` with every request that came to its end, in the event loop."""
        self._listeners.append(listener)

    def _retry_after_s(self, waiting: int) -> float:
        """How long it takes at the rate of late to answer as many requests as wait; between 1 and
        60 seconds."""
        now = time.monotonic()
        while self._finished and self._finished[0] < now - RATE_WINDOW_S:
            self._finished.popleft()
        rate = len(self._finished) / RATE_WINDOW_S
        return min(60.0, max(1.0, waiting / rate if rate else 60.0))

    # State.

    async def load(self) -> dict[str, Any]:
        """Requests that run and wait, see `Engine.load`."""
        return await self._between_steps(self.engine.load)

    async def stats(self) -> dict[str, Any]:
        """What the engine holds and has done, see `Engine.stats`."""
        return await self._between_steps(self.engine.stats)

    @property
    def store(self) -> Store:
        return self.engine.store

    async def follow(self) -> bool:
        """Go on with what others made of the store, between two steps. Tenants that are gone, or
        are other models now, get no new requests, and the change waits for those that they have.

        Returns whether anything was to be changed. Raises EngineError or StoreError; the engine
        then serves what it did before.
        """
        async with self._changes:
            store = await asyncio.to_thread(Store.open, self.engine.store.path)
            if store.manifest == self.engine.store.manifest:
                return False
            async with self.retired(sorted(self.engine.store.departed(store))):
                await self._between_steps(lambda: self.engine.update(store))
            return True

    @asynccontextmanager
    async def retired(self, tenants: Sequence[str]) -> AsyncIterator[None]:
        """Refuse new requests of tenants, and begin when their last ones are done. If the block
        fails they are taken again."""
        try:
            for name in tenants:
                while not await self._between_steps(partial(self.engine.retire, name)):
                    await asyncio.sleep(0.02)
            yield
        except BaseException:
            for name in tenants:
                self._note(partial(self.engine.reinstate, name))
            raise

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait for those that are there. Returns whether all were done in
        time."""
        self._draining = True
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.healthy and self.engine.has_work:
            if end is not None and time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    def cancel_all(self, why: str) -> None:
        """End all requests with an error."""
        error: MoetelError = EngineError(why)
        self._note(lambda: self.engine.fail_all(error))

    def close(self) -> None:
        """Stop the thread after the step that it is in, and free the device. Safe to call twice."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.engine.close()


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    """Call a function in an event loop from another thread; nothing happens if that loop is
    closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        logger.debug("an event loop was closed while a request was under way")
