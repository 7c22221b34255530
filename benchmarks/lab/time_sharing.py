"""Whole models in turn, one loaded at a time.

All that waits for the tenant of the oldest request is answered. Then the next tenant's model is
loaded in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from common import EngineError
from scripts.load.engine_system import EngineSystem
from scripts.load.run import Piece
from scripts.load.traffic import Call


@dataclass(eq=False)
class _Waiting:
    """A request that waits until its tenant's model is loaded."""

    tenant: str
    engine: asyncio.Future[EngineSystem]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class TimeSharing:
    """Whole models, one loaded at a time."""

    slow_to_switch = True

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
