"""Ways to serve a store's tenants, under one face, for `moetel bench` to compare.

moetel: all tenants over the shared experts, continuously batched.
single: one tenant alone, with all of its own experts, given everybody's requests: what the same
    load costs one model.
time_sharing: whole models in turn. All that waits for the tenant of the oldest request is answered,
    then the next tenant's model is loaded in its place.
partition: two processes, each with half of the processor's cores and half of the memory, tenants
    dealt between them, as MIG divides a card. Half of the memory holds no model's experts: what is
    missing is fetched from the store.
paper: arXiv 2505.06481: first come, first served, one request at a time; before a request of
    another tenant the non-expert weights are replaced whole.

Only plans differ: all read the same store's files. No system refuses a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from common import (
    EngineError,
    MoetelError,
    Plan,
    SamplingParams,
    SchedulerOptions,
    Store,
    load_engine,
)
from common.consolidation import Copy, plan_round_robin
from common.serving import AsyncEngine
from common.similarity import tenant_pairs
from scripts.load.load_test import Piece, System
from scripts.load.traffic import Call, redirected

SPARE_SLOTS = 2
"""Copies that a partition has room for beside those that stay: what one token of a Mixtral picks in
a layer. They count as its memory."""

NUM_PARTITIONS = 2

START_S = 600.0
"""A partition that has not loaded by then is given up."""


@dataclass(frozen=True)
class Setup:
    """What all systems have in common. options: of `load_engine`: device, dtype and the backend's
    own."""

    store: Path
    max_num_seqs: int = 16
    default_limit: int | None = None
    max_interference: float = SchedulerOptions.max_interference
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scheduler(self) -> SchedulerOptions:
        tokens = max(SchedulerOptions().max_num_batched_tokens, self.max_num_seqs)
        return SchedulerOptions(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=tokens,
            max_queue=10**9,
            default_limit=self.default_limit,
            max_interference=self.max_interference,
        )


# Other views of the same files.


def own_plan(name: str, num_layers: int, num_experts: int) -> Plan:
    """A tenant alone with a copy of each of its experts."""
    positions = [(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]
    serving = np.arange(len(positions), dtype=np.int32).reshape(1, num_layers, num_experts)
    return Plan(
        "all", (name,), num_layers, num_experts, tuple(Copy(*p, 0) for p in positions), serving
    )


def only(store: Store, names: Sequence[str], plan: Plan) -> Store:
    """The store as if it held these tenants alone; nothing is written."""
    tenants = tuple(store.tenant(name) for name in names)
    return Store(
        store.path, replace(store.manifest, tenants=tenants, plan=plan, merged={}, residuals=())
    )


def alone(store: Store, name: str) -> Store:
    """A tenant's own model."""
    return only(store, [name], own_plan(name, store.experts.num_layers, store.experts.num_experts))


def half_budget(store: Store) -> int:
    """Bytes of one of the partitions: half of one model's experts and one tenant's non-expert
    weights."""
    most = max(store.non_expert_bytes(name) for name in store.tenants)
    return (store.experts.num_positions * store.copy_bytes + most) // NUM_PARTITIONS


def within(store: Store, names: Sequence[str], budget_bytes: int) -> Store:
    """These tenants in so much memory, by the paper's rule: as many positions as fit have a copy,
    others miss.

    Raises EngineError if not even one tenant's non-expert weights and the spare slots fit.
    """
    most = max(store.non_expert_bytes(name) for name in names)
    room = budget_bytes - most - SPARE_SLOTS * store.copy_bytes
    if room < 0:
        raise EngineError(
            f"half of the memory ({budget_bytes} bytes) does not hold one tenant's non-expert "
            f"weights ({most} bytes) "
            f"and {SPARE_SLOTS} experts of {store.copy_bytes} bytes; leave the system 'partition' "
            "out"
        )
    places = [store.tenants.index(name) for name in names]
    wanted = [
        i for i, pair in enumerate(tenant_pairs(len(store.tenants))) if set(pair) <= set(places)
    ]
    score = store.distances.matrix[wanted].sum(axis=0)
    slots = min(room // store.copy_bytes, store.experts.num_positions)
    return only(store, names, plan_round_robin(score, names, slots))


# Systems in this process.


class EngineSystem:
    """An engine, continuously batched."""

    def __init__(
        self, name: str, engine: AsyncEngine, load_s: float, send_all_to: str | None = None
    ):
        """send_all_to: the tenant that answers everybody's requests."""
        self.name, self.load_s = name, load_s
        self._engine, self._send_all_to = engine, send_all_to

    @classmethod
    async def load(
        cls,
        name: str,
        store: Store,
        setup: Setup,
        *,
        send_all_to: str | None = None,
        **options: Any,
    ) -> EngineSystem:
        """options: of `load_engine`, before those of the setup."""
        begun = time.perf_counter()
        engine = await asyncio.to_thread(
            load_engine, store, **{"scheduler": setup.scheduler, **setup.options, **options}
        )
        return cls(name, AsyncEngine(engine), time.perf_counter() - begun, send_all_to)

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        if self._send_all_to is not None:
            vocab_size = self._engine.store.config(self._send_all_to).vocab_size
            (call,) = redirected([call], self._send_all_to, vocab_size)
        params = SamplingParams(max_new_tokens=call.max_new_tokens, ignore_eos=True)
        async with aclosing(_stream(self._engine, call, params)) as pieces:
            async for piece in pieces:
                yield piece

    async def about(self) -> dict[str, Any]:
        """Bytes that stay on the device and what the engine counted."""
        stats = await self._engine.stats()
        kept = (
            "device",
            "dtype",
            "products",
            "misses",
            "fetches",
            "reconfigurations",
            "compilations",
        )
        resident = sum(
            stats.get(k, 0) for k in ("pool_bytes", "residual_bytes", "non_expert_bytes")
        )
        return {
            "load_s": self.load_s,
            "resident_bytes": resident,
            **{k: stats[k] for k in kept if k in stats},
        }

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)


async def _stream(engine: AsyncEngine, call: Call, params: SamplingParams) -> AsyncGenerator[Piece]:
    outputs: Any = engine.generate(call.tenant, list(call.prompt), params)
    async with aclosing(outputs):
        async for output in outputs:
            took_s = output.generation.timings.reconfiguration if output.generation else 0.0
            yield Piece(len(output.token_ids), took_s)


class Paper:
    """One request at a time, in order of arrival, over an engine that keeps one tenant's non-expert
    weights."""

    def __init__(self, inner: EngineSystem):
        self.name = "paper"
        self._inner = inner
        self._turn = asyncio.Lock()  # gives turns in the order in which they were asked for

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        async with self._turn, aclosing(self._inner.generate(call)) as pieces:
            async for piece in pieces:
                yield piece

    async def about(self) -> dict[str, Any]:
        return await self._inner.about()

    async def close(self) -> None:
        await self._inner.close()


@dataclass(eq=False)
class _Waiting:
    """A request that waits until its tenant's model is loaded."""

    tenant: str
    engine: asyncio.Future[EngineSystem]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class TimeSharing:
    """Whole models, one loaded at a time."""

    def __init__(self, load: Callable[[str], Awaitable[EngineSystem]]):
        """load: makes a tenant's own engine."""
        self.name = "time_sharing"
        self._load = load
        self._loaded: tuple[str, EngineSystem] | None = None
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self.load_times: list[float] = []
        self.resident_bytes = 0
        self._worker = asyncio.create_task(self._run())

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        mine = _Waiting(call.tenant, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        self._wake.set()
        try:
            engine = await mine.engine
            async with aclosing(engine.generate(call)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
            mine.done.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            if not self._waiting:
                self._wake.clear()
                continue
            tenant = self._waiting[0].tenant
            batch = [w for w in self._waiting if w.tenant == tenant]
            self._waiting = [w for w in self._waiting if w.tenant != tenant]
            try:
                engine = await self._switch(tenant)
            except Exception as error:
                for one in batch:
                    if not one.engine.done():
                        one.engine.set_exception(
                            EngineError(f"tenant {tenant!r} could not be loaded ({error})")
                        )
                continue
            for one in batch:
                if not one.engine.done():
                    one.engine.set_result(engine)
            for one in batch:
                await one.done.wait()

    async def _switch(self, tenant: str) -> EngineSystem:
        """The tenant's engine, after the one that is loaded was unloaded."""
        if self._loaded is not None and self._loaded[0] == tenant:
            return self._loaded[1]
        await self._unload()
        engine = await self._load(tenant)
        self._loaded = tenant, engine
        self.load_times.append(engine.load_s)
        self.resident_bytes = max(self.resident_bytes, (await engine.about())["resident_bytes"])
        return engine

    async def _unload(self) -> None:
        if self._loaded is not None:
            (_, engine), self._loaded = self._loaded, None
            await engine.close()

    async def about(self) -> dict[str, Any]:
        times = self.load_times or [0.0]
        return {
            "load_s": sum(times) / len(times),
            "loads": len(times),
            "resident_bytes": self.resident_bytes,
        }

    async def close(self) -> None:
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        await self._unload()


# Systems in processes of their own.


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


SYSTEMS = ("single", "moetel", "paper", "partition", "time_sharing")
"""In the order in which they are tested: the first one's saturation sets the rates."""


async def open_system(name: str, setup: Setup) -> System:
    """Load a system. Raises EngineError, StoreError."""
    store = Store.open(setup.store)
    if name == "moetel":
        return await EngineSystem.load(name, store, setup)
    if name == "single":
        tenant = store.tenants[0]
        one = replace(
            setup, default_limit=None
        )  # a limit for each of many tenants is none for the only one
        return await EngineSystem.load(name, alone(store, tenant), one, send_all_to=tenant)
    if name == "paper":
        plan = plan_round_robin(store.distances.score(), store.tenants)
        one = replace(setup, max_num_seqs=1)
        return Paper(await EngineSystem.load(name, store.with_plan(plan), one, ready_tenants=1))
    if name == "partition":
        return await Partition.start(store, setup)
    if name == "time_sharing":
        one = replace(setup, default_limit=None)
        return TimeSharing(lambda tenant: EngineSystem.load(name, alone(store, tenant), one))
    raise EngineError(f"no system {name!r}; there is: {', '.join(SYSTEMS)}")
