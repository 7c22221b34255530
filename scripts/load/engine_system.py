"""An engine of this process as a system to load-test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import SamplingParams, SchedulerOptions, Store, load_engine
from common.serving.async_engine import AsyncEngine
from scripts.load.run import Piece
from scripts.load.traffic import Call


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


class EngineSystem:
    """An engine, continuously batched."""

    def __init__(self, name: str, engine: AsyncEngine, load_s: float):
        self.name, self.load_s, self.engine = name, load_s, engine
        self._calls = 0

    @classmethod
    async def load(cls, name: str, store: Store, setup: Setup, **options: Any) -> EngineSystem:
        """options: of `load_engine`, before those of the setup."""
        begun = time.perf_counter()
        engine = await asyncio.to_thread(
            load_engine, store, **{"scheduler": setup.scheduler, **setup.options, **options}
        )
        return cls(name, AsyncEngine(engine), time.perf_counter() - begun)

    async def generate(self, call: Call) -> AsyncGenerator[Piece]:
        params = SamplingParams(max_new_tokens=call.max_new_tokens, ignore_eos=True)
        # The same trace comes again and again, and no run shall find what the last one left.
        self._calls += 1
        outputs: Any = self.engine.generate(
            call.tenant, list(call.prompt), params, cache_salt=f"call {self._calls}"
        )
        async with aclosing(outputs):
            async for output in outputs:
                took_s = output.generation.timings.reconfiguration if output.generation else 0.0
                yield Piece(len(output.token_ids), took_s)

    async def about(self) -> dict[str, Any]:
        """Bytes that stay on the device and what the engine counted."""
        stats = await self.engine.stats()
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
        await asyncio.to_thread(self.engine.close)
