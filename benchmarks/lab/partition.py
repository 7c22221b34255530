"""Two processes, each with half of the processor's cores and half of the memory.

Tenants are dealt between them, as MIG divides a card. Half of the memory holds no model's experts:
what is missing is fetched from the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.lab.half_memory import NUM_PARTITIONS, SPARE_SLOTS, half_budget, within
from common import EngineError, MoetelError, Store
from scripts.load.engine_system import EngineSystem, Setup
from scripts.load.run import Piece
from scripts.load.traffic import Call

START_S = 600.0
"""A partition that has not loaded by then is given up."""


@dataclass(frozen=True)
class _Share:
    """What a partition's process is told."""

    setup: Setup
    tenants: tuple[str, ...]
    budget_bytes: int
    cores: tuple[int, ...]
    threads: int


def divide_cores(num_parts: int) -> list[tuple[int, ...]]:
    """The cores that this process may use, in as many runs of equal length; all of them each if
    there are too few."""
    if not hasattr(os, "sched_getaffinity"):  # macOS cannot pin
        return [()] * num_parts
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // num_parts
    return [
        tuple(cores[i * each : (i + 1) * each]) if each else tuple(cores) for i in range(num_parts)
    ]


def _run_partition(connection: Connection, share: _Share) -> None:
    """A partition's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    if share.cores:
        os.sched_setaffinity(0, share.cores)
    # Before a framework is imported: it reads them once.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(share.threads)
    asyncio.run(_serve_partition(connection, share))


async def _serve_partition(connection: Connection, share: _Share) -> None:
    loop = asyncio.get_running_loop()
    try:
        store = within(Store.open(share.setup.store), share.tenants, share.budget_bytes)
        system = await EngineSystem.load("partition", store, share.setup, spare_slots=SPARE_SLOTS)
        about = await system.about()
        if not str(about["device"]).startswith("cpu"):
            await system.close()
            raise EngineError(
                f"partition divides a processor's cores, and the device is {about['device']}; "
                "leave it out of "
                "--systems, or give --device cpu"
            )
    except MoetelError as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", about))
    tasks: dict[int, asyncio.Task[None]] = {}
    closing = asyncio.Event()

    async def answer(number: int, call: Call) -> None:
        error: str | None = None
        try:
            async with aclosing(system.generate(call)) as pieces:
                async for piece in pieces:
                    connection.send(("piece", number, piece))
        except Exception as found:
            error = f"{type(found).__name__}: {found}"
        finally:
            tasks.pop(number, None)
        connection.send(("end", number, error))

    async def tell(number: int) -> None:
        connection.send(("about", number, await system.about()))

    def take(message: tuple[Any, ...]) -> None:
        if message[0] == "ask":
            tasks[message[1]] = asyncio.create_task(answer(message[1], message[2]))
        elif message[0] == "about":
            tasks[message[1]] = asyncio.create_task(tell(message[1]))
        elif message[1] in tasks:
            tasks[message[1]].cancel()

    def listen() -> None:
        # The end of the connection is the parent's word to close, and its death too.
        with contextlib.suppress(EOFError, OSError):
            while (message := connection.recv())[0] != "close":
                loop.call_soon_threadsafe(take, message)
        loop.call_soon_threadsafe(closing.set)

    threading.Thread(target=listen, daemon=True).start()
    await closing.wait()
    for task in list(tasks.values()):
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    await system.close()


class _Process:
    """The parent's side of one partition."""

    def __init__(self, share: _Share):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_run_partition, args=(theirs, share), daemon=True)
        self.process.start()
        theirs.close()
        self._loop = asyncio.get_running_loop()
        self._answers: dict[int, asyncio.Queue[tuple[Any, ...]]] = {}
        self._numbers = 0
        self.ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        with contextlib.suppress(
            EOFError, OSError, RuntimeError
        ):  # RuntimeError: our event loop is closed
            try:
                while True:
                    message = self._connection.recv()
                    self._loop.call_soon_threadsafe(self._take, message)
            finally:
                self._loop.call_soon_threadsafe(self._gone)

    def _take(self, message: tuple[Any, ...]) -> None:
        if message[0] in ("ready", "failed"):
            if self.ready.done():
                return
            if message[0] == "ready":
                self.ready.set_result(message[1])
            else:
                self.ready.set_exception(EngineError(message[1]))
        elif message[1] in self._answers:
            self._answers[message[1]].put_nowait(message)

    def _gone(self) -> None:
        if not self.ready.done():
            self.ready.set_exception(
                EngineError("a partition's process ended before it was loaded")
            )
        for number, queue in self._answers.items():
            queue.put_nowait(("end", number, "the partition's process ended"))

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        self._numbers += 1
        number = self._numbers
        queue = self._answers[number] = asyncio.Queue()
        ended = False
        try:
            self._send("ask", number, call)
            while True:
                message = await queue.get()
                if message[0] == "piece":
                    yield message[2]
                    continue
                ended = True
                if message[2] is not None:
                    raise EngineError(message[2])
                return
        finally:
            del self._answers[number]
            if not ended:
                with contextlib.suppress(EngineError):
                    self._send("cancel", number)

    async def about(self) -> dict[str, Any]:
        self._numbers += 1
        number = self._numbers
        queue = self._answers[number] = asyncio.Queue()
        try:
            self._send("about", number)
            message = await queue.get()
        finally:
            del self._answers[number]
        if message[0] != "about":
            raise EngineError(message[2])
        found: dict[str, Any] = message[2]
        return found

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise EngineError(f"the partition's process ended ({error})") from error

    async def close(self) -> None:
        """End the process, by force if it does not go."""
        with contextlib.suppress(EngineError):
            self._send("close")
        await asyncio.to_thread(self.process.join, 30)
        if self.process.is_alive():
            self.process.kill()
            await asyncio.to_thread(self.process.join, 10)
        self._reader.join(10)
        self._connection.close()


class Partition:
    """Two isolated processes."""

    def __init__(self, processes: Sequence[_Process], of_tenant: Mapping[str, int]):
        self.name = "partition"
        self.processes, self._of_tenant = processes, of_tenant

    @classmethod
    async def start(cls, store: Store, setup: Setup) -> Partition:
        """Raises EngineError; then no process is left."""
        names = store.tenants
        if len(names) < NUM_PARTITIONS:
            raise EngineError(
                f"partition divides tenants among {NUM_PARTITIONS} processes, and there is "
                f"{len(names)}"
            )
        cores = divide_cores(NUM_PARTITIONS)
        given = int(os.environ.get("OMP_NUM_THREADS") or 0)  # what the user allows each process
        processes: list[_Process] = []
        try:
            for i in range(NUM_PARTITIONS):
                threads = len(cores[i]) or 1
                share = _Share(
                    setup=setup,
                    tenants=names[i::NUM_PARTITIONS],
                    budget_bytes=half_budget(store),
                    cores=cores[i],
                    threads=min(threads, given) if given else threads,
                )
                within(
                    store, share.tenants, share.budget_bytes
                )  # tells what is wrong before a process starts
                processes.append(_Process(share))
            for process in processes:
                await asyncio.wait_for(process.ready, START_S)
        except BaseException:
            await asyncio.gather(*(p.close() for p in processes))
            for process in processes:
                if process.ready.done() and not process.ready.cancelled():
                    process.ready.exception()  # looked at: the first is what is raised
            raise
        return cls(processes, {n: i % NUM_PARTITIONS for i, n in enumerate(names)})

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        async with aclosing(self.processes[self._of_tenant[call.tenant]].generate(call)) as pieces:
            async for piece in pieces:
                yield piece

    async def about(self) -> dict[str, Any]:
        each = [await process.about() for process in self.processes]
        return {
            "load_s": max(a["load_s"] for a in each),
            "resident_bytes": sum(a["resident_bytes"] for a in each),
            "compilations": sum(a.get("compilations", 0) for a in each),
            "partitions": each,
        }

    async def close(self) -> None:
        await asyncio.gather(*(p.close() for p in self.processes))
