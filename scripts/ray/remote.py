"""The engines of all replicas, with the face of one engine in this process.

This is the seam: `scripts/server` runs over it unchanged. Texts are made here from the store's
tokenizers, weights are the replicas' alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from common.errors import EngineError, OverloadedError, UnknownTenantError
from common.plan.plan import Plan
from common.sampling_params import SamplingParams
from common.serving.checks import check_ids
from common.serving.request import Output
from common.serving.scheduler_options import SchedulerOptions
from common.serving.tenant_text import TenantText
from common.serving.tenant_texts import Texts
from common.store import Store
from scripts.ray.failures import Failure

log = logging.getLogger(__name__)

TRIES = 4
LOST = (ActorDiedError, ActorUnavailableError, RayActorError, DeploymentUnavailableError)
BEHIND_S = 10.0
"""How long replicas may take to notice a tenant that this process knows already."""


class StoreFace:
    """What `Engine` says of its store and texts, without weights."""

    def __init__(self, store: Store, options: SchedulerOptions):
        self.store, self.options = store, options
        self._texts = Texts(store)

    @property
    def tenants(self) -> tuple[str, ...]:
        return self.store.tenants

    @property
    def unavailable(self) -> dict[str, str]:
        return {n: why for n, why in self._texts.failures.items() if n in self.tenants}

    @property
    def plan(self) -> Plan:
        return self.store.plan

    def load_texts(self) -> dict[str, str]:
        """Load all tokenizers. Returns `unavailable`."""
        self._texts.load_all()
        return self.unavailable

    def text(self, tenant: str) -> TenantText:
        return self._texts.of(tenant)

    def tokenize(self, tenant: str, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.text(tenant).encode(text, add_special_tokens)

    def detokenize(
        self, tenant: str, token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        tokenizer = self.text(tenant).require("token ids have no text")
        ids = check_ids(tenant, self.store.config(tenant), token_ids, "token_ids")
        return tokenizer.decode(ids, skip_special_tokens)

    def update(self, store: Store) -> None:
        gone = self.store.departed(store)
        self.store = self._texts.store = store
        self._texts.forget(gone.__contains__)


class RemoteEngine:
    """`AsyncEngine`'s face over a handle of `EngineReplica`s."""

    healthy = True

    def __init__(self, store: Store, options: SchedulerOptions, handle: DeploymentHandle):
        self.engine = StoreFace(store, options)
        self._generate: Any = handle.options(method_name="generate", stream=True)
        self._open: dict[str, list[int]] = {}

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
        self, tenant: str, prompt: list[int], params: SamplingParams, **options: Any
    ) -> AsyncIterator[Output]:
        """As `AsyncEngine.generate`. If a replica is lost, another one answers from the start.

        What was given out already is then left out, if it is the same; else EngineError is raised.
        """
        if params.temperature and params.seed is None:
            params = replace(params, seed=random.getrandbits(31))
        given: list[int] = []
        state = [0]
        counts = self._open.setdefault(tenant, [0, 0])
        counts[0] += 1
        try:
            for attempt in range(TRIES):
                try:
                    async for output in self._once(tenant, prompt, params, options):
                        new = _without(output, given, state)
                        if new is None:
                            continue
                        yield new
                        if new.generation is not None:
                            return
                    raise EngineError("the replica ended the answer before it was whole")
                except LOST as error:
                    state[0] = 0
                    log.warning(
                        "a replica was lost (%s); try %d", type(error).__name__, attempt + 2
                    )
                    await asyncio.sleep(0.2 * 2**attempt)
                except RayError as error:
                    raise EngineError(f"a replica failed ({error})") from error
            raise EngineError("replicas were lost again and again; see Ray's logs")
        finally:
            counts[0] -= 1

    async def _once(
        self, tenant: str, prompt: list[int], params: SamplingParams, options: dict[str, Any]
    ) -> AsyncIterator[Output]:
        until = asyncio.get_running_loop().time() + BEHIND_S
        while True:
            behind = False
            stream = self._generate.remote(tenant, prompt, params, options)
            try:
                async for item in stream:
                    if not isinstance(item, Failure):
                        yield item
                        continue
                    error = item.error()
                    late = asyncio.get_running_loop().time() > until
                    if not isinstance(error, UnknownTenantError) or late:
                        raise error
                    if tenant not in self.store.tenants:
                        raise error
                    behind = True
            except BackPressureError as error:
                raise OverloadedError("all replicas are full; try again", 0, 1.0) from error
            finally:
                stream.cancel()
            if not behind:
                return
            await asyncio.sleep(0.5)

    async def load(self) -> dict[str, Any]:
        """Requests that this process has sent and whose answers are not whole."""
        tenants = {t: {"running": n[0], "waiting": 0} for t, n in self._open.items() if n[0]}
        running = sum(t["running"] for t in tenants.values())
        return {"running": running, "waiting": 0, "tenants": tenants}

    async def stats(self) -> dict[str, Any]:
        """Nothing: replicas report to Ray's own metrics."""
        raise EngineError("replicas count for themselves")

    async def add_tenant(self, *_: Any, **__: Any) -> NoReturn:
        raise EngineError("on Ray a store is changed by `moetel add`; all replicas follow it")

    async def remove_tenant(self, *_: Any) -> NoReturn:
        raise EngineError("on Ray a store is changed by `moetel remove`; all replicas follow it")


def _without(output: Output, given: list[int], state: list[int]) -> Output | None:
    """The output, if it was not given out before a replica was lost. Raises EngineError.

    state: tokens seen of this try.
    """
    ids = list(output.token_ids)
    start, end = state[0], state[0] + len(ids)
    state[0] = end
    if given[start:end] != ids[: max(0, len(given) - start)]:
        raise EngineError("a replica was lost, and another one answered otherwise; ask again")
    if start >= len(given):
        given.extend(ids)
        return output
    if end <= len(given) and output.generation is None:
        return None
    raise EngineError("a replica was lost amid the answer; ask again")
