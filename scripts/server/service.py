"""What all routes share: the engine, who may call, limits, measurements, and whether the server
stops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import EngineError, TenantUnavailableError
from common.serving.store_watch import StoreWatch
from scripts.server.errors import RATE, SERVER, ApiError, retry_after, unknown_model
from scripts.server.keys import Key
from scripts.server.metrics import Metrics
from scripts.server.rate_limiter import RateLimiter
from scripts.server.settings import ServerSettings
from scripts.server.window import Window

if TYPE_CHECKING:
    from common.build.online import OnlineEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Who asks. key: None on a server without keys, where everybody may use every tenant."""

    key: Key | None = None

    def allows(self, tenant: str) -> bool:
        return self.key is None or self.key.allows(tenant)

    @property
    def admin(self) -> bool:
        return self.key is None or self.key.admin


class Stoppable(Protocol):
    """What answers a request and can be told to end."""

    def stop(self, reason: Exception) -> None: ...


class Service:
    """The state of one server. `engine` is None until the store is loaded."""

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.engine: OnlineEngine | None = None
        self.started_at = int(time.time())
        self.limiter = RateLimiter(settings.rate_limit)
        self.window = Window()
        self.metrics = Metrics()
        self.watch: StoreWatch | None = None
        self.runs: set[Stoppable] = set()
        self.requests = 0
        """HTTP requests that are being answered, those about the server itself left out."""
        self.draining = False
        self.cancelled: ApiError | None = None
        self._drain_until = 0.0
        self._warm: set[str] = set()

    def attach(self, engine: OnlineEngine) -> None:
        """The store is loaded."""
        self.engine = engine
        if self.settings.watch_store:
            self.watch = StoreWatch(engine, self.changed)

    def changed(self, come: Collection[str], gone: Collection[str]) -> None:
        """The store has other tenants."""
        for tenant in gone:
            self.forget(tenant)
        for tenant in come:
            self.warn_of_unused(tenant)

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.engine.healthy and not self.draining

    def require(self) -> OnlineEngine:
        """The engine. Raises ApiError while there is none."""
        if self.engine is None:
            raise ApiError(
                503,
                "the store is being loaded; GET /ready tells when it is",
                SERVER,
                code="loading",
                headers=retry_after(5),
            )
        if not self.engine.healthy:
            raise ApiError(
                503, "the engine has stopped; see the server's log", SERVER, code="engine_stopped"
            )
        return self.engine

    def refuse_if_draining(self) -> None:
        """Raises ApiError."""
        if self.draining:
            left = self._drain_until - time.monotonic()
            raise ApiError(
                503,
                "the server is stopping and takes no new requests; try another, or later",
                SERVER,
                code="draining",
                headers=retry_after(left),
            )

    # Who may do what.

    def access(self, authorization: str | None) -> Access:
        """Of a request with this header. Raises ApiError."""
        if self.settings.keys is None:
            return Access()
        scheme, _, secret = (authorization or "").partition(" ")
        key = self.settings.keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            what = "no API key was sent" if not authorization else "this API key is not known"
            raise ApiError(
                401,
                f"{what}; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Access(key)

    def require_admin(self, access: Access) -> None:
        """For changes. Raises ApiError."""
        if not self.settings.enable_admin:
            raise ApiError(
                403,
                "tenants cannot be changed on this server; start it with --enable-admin",
                code="admin_disabled",
            )
        self.require_operator(access)

    @staticmethod
    def require_operator(access: Access) -> None:
        """For what tells of all tenants. Raises ApiError."""
        if not access.admin:
            raise ApiError(
                403,
                "this needs an admin key (moetel keys new --admin)",
                code="insufficient_permissions",
            )

    def visible(self, access: Access) -> list[str]:
        """The tenants that somebody may use, in the store's order."""
        return [name for name in self.tenants if access.allows(name)]

    def resolve(self, model: str, access: Access) -> str:
        """The tenant that a request names. Raises ApiError."""
        self.require()
        if model not in self.tenants or not access.allows(model):
            raise unknown_model(model)
        return model

    def count(self, access: Access, tenant: str) -> None:
        """Take a request into the rate of its key, or of its tenant on a server without keys.
        Raises ApiError."""
        name = f"tenant {tenant}" if access.key is None else f"key {access.key.name}"
        wait_s = self.limiter.take(name)
        if wait_s > 0:
            whose = "this tenant" if access.key is None else "this key"
            raise ApiError(
                429,
                f"{whose} may send {self.settings.rate_limit} requests a minute and has; "
                f"the next is taken in {wait_s:.1f} s",
                RATE,
                code="rate_limit_exceeded",
                headers=retry_after(wait_s),
            )

    # What tenants are like.

    def max_model_len(self, tenant: str) -> int:
        """Tokens of prompt and answer together."""
        engine = self.require().engine
        context = engine.store.config(tenant).max_positions
        return min(context, engine.options.max_model_len or context)

    async def has_tokenizer(self, tenant: str) -> bool:
        """Loads it at the tenant's first request, outside the event loop: it takes seconds."""
        engine = self.require().engine
        if tenant not in self._warm:
            await asyncio.to_thread(engine.text, tenant)
            self._warm.add(tenant)
        return engine.text(tenant).has_tokenizer

    def sampling_defaults(self, tenant: str) -> Mapping[str, int | float]:
        """What the tenant's generation_config.json says of sampling. Raises
        TenantUnavailableError."""
        if not self.settings.generation_config:
            return {}
        return self.require().engine.text(tenant).generation.sampling

    def warn_of_unused(self, tenant: str) -> None:
        """Log what the tenant's generation_config.json asks for and nobody does."""
        with suppress(TenantUnavailableError):
            for note in self.require().engine.text(tenant).generation.notes():
                log.warning("tenant %s: %s", tenant, note)

    def unavailable(self, access: Access) -> dict[str, str]:
        """Tenants that cannot be asked, of those that somebody may use, and why."""
        found = {} if self.engine is None else self.engine.engine.unavailable
        return {name: why for name, why in found.items() if access.allows(name)}

    def forget(self, tenant: str) -> None:
        """A tenant is gone."""
        self._warm.discard(tenant)
        self.metrics.forget(tenant)
        self.window.forget(tenant)

    @property
    def body_limit(self) -> int:
        if self.engine is None:
            return self.settings.body_limit(0)
        store = self.engine.engine.store
        return self.settings.body_limit(
            max((store.config(t).max_positions for t in store.tenants), default=0)
        )

    # The end.

    def start_draining(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True
        self._drain_until = time.monotonic() + self.settings.drain_timeout_s

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is being answered; False if that took longer."""
        until = time.monotonic() + timeout_s
        while self.requests:
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.02)
        return True

    def cancel_all(self) -> None:
        """End what still runs, and what is about to, with an error."""
        self.cancelled = ApiError(
            503,
            "the server had to stop before the answer was whole",
            SERVER,
            code="cancelled",
            headers=retry_after(1),
        )
        for run in list(self.runs):
            run.stop(self.cancelled)

    # What the engine says of itself.

    async def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Its load and its statistics, taken between two steps; None without an engine that
        runs."""
        if self.engine is None:
            return None
        try:
            return await self.engine.load(), await self.engine.stats()
        except EngineError:
            return None

    @property
    def tenants(self) -> tuple[str, ...]:
        return () if self.engine is None else self.engine.engine.tenants
