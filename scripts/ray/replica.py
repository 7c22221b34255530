"""What runs in each replica: an engine of the store, which follows the store's changes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

from common.errors import MoetelError
from common.sampling_params import SamplingParams
from common.serving.async_engine import AsyncEngine
from common.serving.loading import load_engine
from common.serving.request import Output
from common.serving.scheduler_options import SchedulerOptions
from common.serving.store_watch import StoreWatch
from scripts.ray.exported_metrics import ExportedMetrics
from scripts.ray.failures import Failure
from scripts.ray.settings import RaySettings

log = logging.getLogger(__name__)


class EngineReplica:
    """Ray Serve makes one in each replica and calls its methods in one event loop."""

    def __init__(self, settings: RaySettings):
        own = ("kv_cache_bytes", "ready_tenants")
        options: dict[str, Any] = {n: v for n in own if (v := getattr(settings, n)) is not None}
        if settings.dtype is not None:
            options["dtype"] = settings.dtype
        engine = load_engine(
            settings.store,
            backend=settings.backend,
            device=settings.device,
            scheduler=SchedulerOptions(
                max_num_seqs=settings.max_num_seqs,
                max_queue=settings.max_queue,
                max_model_len=settings.max_model_len,
            ),
            **options,
        )
        for name, why in engine.load_texts().items():
            log.error("tenant %s is unavailable: %s", name, why)
        self._engine = AsyncEngine(engine)
        self._watching: asyncio.Task[None] | None = None
        self._watch = settings.watch
        self._routed: dict[str, dict[str, int]] = {}
        self._exported = ExportedMetrics()

    def _start(self) -> None:
        if self._watch and self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(StoreWatch(self._engine).run())

    async def generate(
        self, tenant: str, prompt: list[int], params: SamplingParams, options: dict[str, Any]
    ) -> AsyncIterator[Output | Failure]:
        """Outputs as `AsyncEngine.generate` gives them; an error of ours comes as the last one."""
        self._start()
        self._routed.setdefault(tenant, {"true": 0, "false": 0})
        self._routed[tenant]["true" if self._engine.engine.is_ready(tenant) else "false"] += 1
        try:
            outputs = self._engine.generate(tenant, prompt, params, **options)
            async with aclosing(cast(Any, outputs)) as stream:
                async for output in stream:
                    yield output
        except MoetelError as error:
            yield Failure.of(error, is_lost=not self._engine.healthy)

    async def record_routing_stats(self) -> dict[str, Any]:
        """For the router, which Serve asks every second."""
        self._start()
        if not self._engine.healthy:
            return {"ready": [], "is_lost": True}
        load, stats = await self._engine.load(), await self._engine.stats()
        self._exported.send(load, stats, self._engine.engine.tenants)
        return {
            "ready": stats.get("ready_tenants", []),
            "max_ready": stats["max_ready_tenants"],
            "waiting": load["waiting"],
        }

    async def report(self) -> dict[str, Any]:
        """The replica's process, and what its engine holds and does. Raises EngineError."""
        return {
            "pid": os.getpid(),
            "load": await self._engine.load(),
            "stats": await self._engine.stats(),
            "routed": self._routed,
        }

    async def check_health(self) -> None:
        """Serve starts a replica anew where this raises."""
        self._start()
        if not self._engine.healthy:
            raise RuntimeError("the engine has stopped; see the replica's log")

    def __del__(self) -> None:
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.close()
