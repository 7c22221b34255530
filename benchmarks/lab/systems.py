"""Ways to serve a store's tenants, under one face, for `moetel bench` to compare.

moetel: all tenants over the shared experts, continuously batched.
single: one tenant alone, with all of its own experts, given everybody's requests.
time_sharing: whole models in turn (`time_sharing.py`).
partition: two processes, each with half of the machine (`partition.py`).
paper: arXiv 2505.06481: first come, first served, one request at a time; before a request of
    another tenant the non-expert weights are replaced whole.

Only plans differ: all read the same store's files. No system refuses a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from benchmarks.lab.partition import Partition
from benchmarks.lab.time_sharing import TimeSharing
from common import EngineError, Store
from common.planning.round_robin import plan_round_robin
from scripts.commands.bench import SYSTEMS
from scripts.load.engine_system import EngineSystem, Setup
from scripts.load.run import Piece, System
from scripts.load.traffic import Call
from scripts.store_views import alone_store


class Single:
    """One tenant's engine, which answers everybody's requests."""

    def __init__(self, inner: EngineSystem, tenant: str):
        self.name = "single"
        self.inner, self._tenant = inner, tenant

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        vocab_size = self.inner.engine.store.config(self._tenant).vocab_size
        async with aclosing(
            self.inner.generate(redirected(call, self._tenant, vocab_size))
        ) as pieces:
            async for piece in pieces:
                yield piece

    async def about(self) -> dict[str, Any]:
        return await self.inner.about()

    async def close(self) -> None:
        await self.inner.close()


def redirected(call: Call, tenant: str, vocab_size: int) -> Call:
    """The same request to this tenant; token ids that it does not have become others."""
    return replace(call, tenant=tenant, prompt=tuple(t % vocab_size for t in call.prompt))


class Paper:
    """One request at a time, in order of arrival, over an engine that keeps one tenant's non-expert
    weights."""

    slow_to_switch = True

    def __init__(self, inner: EngineSystem):
        self.name = "paper"
        self.inner = inner
        self._turn = asyncio.Lock()  # gives turns in the order in which they were asked for

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        async with self._turn, aclosing(self.inner.generate(call)) as pieces:
            async for piece in pieces:
                yield piece

    async def about(self) -> dict[str, Any]:
        return await self.inner.about()

    async def close(self) -> None:
        await self.inner.close()


async def open_system(name: str, setup: Setup) -> System:
    """Load a system. Raises EngineError, StoreError."""
    store = Store.open(setup.store)
    if name == "moetel":
        return await EngineSystem.load(name, store, setup)
    if name == "single":
        tenant = store.tenants[0]
        # A limit for each of many tenants is none for the only one.
        one = replace(setup, default_limit=None)
        return Single(await EngineSystem.load(name, alone_store(store, [tenant]), one), tenant)
    if name == "paper":
        plan = plan_round_robin(store.distances.score(), store.tenants)
        one = replace(setup, max_num_seqs=1)
        return Paper(await EngineSystem.load(name, store.with_plan(plan), one, ready_tenants=1))
    if name == "partition":
        return await Partition.start(store, setup)
    if name == "time_sharing":
        one = replace(setup, default_limit=None)
        return TimeSharing(
            lambda tenant: EngineSystem.load(name, alone_store(store, [tenant]), one)
        )
    raise EngineError(f"no system {name!r}; there is: {', '.join(SYSTEMS)}")
