"""The engines of all replicas, with the face of one engine in this process.

This is the seam: `scripts/server` runs over it unchanged. Texts are made here from the store's
tokenizers, weights are the replicas' alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

from ray.serve.handle import DeploymentHandle

from common.errors import DeadlineError, EngineError, OverloadedError, UnknownTenantError
from common.sampling_params import SamplingParams
from common.serving.request import Output
from common.serving.scheduler_options import SchedulerOptions
from common.serving.store_texts import StoreTexts
from common.store import Store
from scripts.ray.failures import ReplicaLostError, received
from scripts.ray.replay import Replay
from scripts.ray.reports import Reports, together

log = logging.getLogger(__name__)

TRIES = 8
MAX_PAUSE_S = 2.0
"""Between two tries. A lost replica is known to be lost in less."""
BEHIND_S = 10.0
"""How long replicas may take to notice a tenant that this process knows already."""


class RemoteEngine:
    """`AsyncEngine`'s face over a handle of `EngineReplica`s."""

    healthy = True

    def __init__(self, store: Store, options: SchedulerOptions, handle: DeploymentHandle):
        self.engine = StoreTexts(store, options)
        self._generate: Any = handle.options(method_name="generate", stream=True)
        self.reports = Reports(handle)
        self._open: dict[str, int] = {}
        self.losses = 0
        """Answers that a replica was lost under."""

    @property
    def store(self) -> Store:
        return self.engine.store

    async def follow(self) -> bool:
        """Know the store's new state; the replicas follow it themselves."""
        store = await asyncio.to_thread(Store.open, self.store.path)
        if store.manifest == self.store.manifest:
            return False
        self.engine.update(store)
        return True

    async def generate(
        self,
        tenant: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        deadline_s: float | None = None,
        streamed: bool = True,
        **options: Any,
    ) -> AsyncIterator[Output]:
        """As `AsyncEngine.generate`. If a replica is lost, another one answers from the start.

        What was given out already is then left out. If it comes otherwise and is `streamed`,
        EngineError is raised.
        """
        if params.temperature and params.seed is None:  # so that it can be repeated
            params = replace(params, seed=random.getrandbits(31))
        begun, replay = time.monotonic(), Replay(streamed)
        self._open[tenant] = self._open.get(tenant, 0) + 1
        try:
            for attempt in range(TRIES):
                left = None if deadline_s is None else deadline_s + begun - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineError("the deadline passed while a replica was replaced")
                found = self._known(tenant, prompt, params, options | {"deadline_s": left})
                try:
                    async with aclosing(cast(Any, found)) as outputs:
                        async for output in outputs:
                            if (new := replay.news(output)) is not None:
                                yield new
                            if output.generation is not None:
                                return
                    raise ReplicaLostError("its answer ended before it was whole")
                except ReplicaLostError as error:
                    self.losses += 1
                    replay.restart()
                    log.warning("a replica was lost (%s); try %d", error, attempt + 2)
                    await asyncio.sleep(min(MAX_PAUSE_S, 0.1 * 2**attempt))
            raise EngineError(f"{TRIES} replicas were lost one after another; see Ray's logs")
        finally:
            self._open[tenant] -= 1

    async def _known(self, *args: Any) -> AsyncIterator[Output]:
        """One try, once the replica knows the tenant; another one if the first is full."""
        tenant = args[0]
        until, refusals = time.monotonic() + BEHIND_S, 0
        while True:
            try:
                found = received(partial(self._generate.remote, *args))
                async with aclosing(cast(Any, found)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except UnknownTenantError:
                if tenant not in self.store.tenants or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.5)
            except OverloadedError:  # it comes before any output
                refusals += 1
                if refusals == 2:
                    raise

    async def load(self) -> dict[str, Any]:
        """Requests that run and wait in all replicas, see `Engine.load`. Without one that answers:
        those that this process has sent."""
        reports = await self.reports.all()
        if reports:
            found: dict[str, Any] = together([r["load"] for r in reports])
            return found
        tenants = {t: {"running": n, "waiting": 0} for t, n in self._open.items() if n}
        running = sum(t["running"] for t in tenants.values())
        return {"running": running, "waiting": 0, "tenants": tenants}

    async def stats(self) -> dict[str, Any]:
        """What all replicas hold and have done, see `Engine.stats`. Raises EngineError."""
        reports = await self.reports.all()
        if not reports:
            raise EngineError("no replica says what it does")
        found: dict[str, Any] = together([r["stats"] for r in reports])
        return found

    async def add_tenant(self, *_: Any, **__: Any) -> NoReturn:
        raise EngineError("on Ray a store is changed by `moetel add`; all replicas follow it")

    async def remove_tenant(self, *_: Any) -> NoReturn:
        raise EngineError("on Ray a store is changed by `moetel remove`; all replicas follow it")
