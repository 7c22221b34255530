"""A running engine that takes changes of its store: tenants come and go while others are served."""

from __future__ import annotations

import asyncio
from pathlib import Path

from common.build.build import remove_tenant
from common.build.extend import extend_store
from common.errors import UnknownTenantError
from common.serving.async_engine import AsyncEngine


class OnlineEngine(AsyncEngine):
    """An `AsyncEngine` whose tenants can be added and removed."""

    async def add_tenant(
        self,
        name: str,
        checkpoint: str | Path,
        *,
        config: str | Path | None = None,
        base: str | Path | None = None,
    ) -> None:
        """Add a tenant to the store and to the running engine. Copies that others use do not
        change, nor do answers.

        Raises CheckpointError, PlanError, StoreError, EngineError; store and engine are then as
        they were.
        """
        async with self._changes:
            self._require_healthy()
            path = self.engine.store.path
            store = await asyncio.to_thread(
                extend_store, path, name, checkpoint, config=config, base=base
            )
            try:
                await self._between_steps(lambda: self.engine.update(store))
            except Exception:
                await asyncio.to_thread(remove_tenant, path, name, keep_plan=True)
                raise

    async def remove_tenant(self, name: str) -> None:
        """Refuse a tenant's new requests, wait for its running ones, then take it out of the engine
        and the store.

        Raises UnknownTenantError, StoreError (a store keeps at least one tenant), EngineError.
        """
        async with self._changes:
            store = self.engine.store
            if name not in store.tenants:
                raise UnknownTenantError(name, self.engine.tenants)
            async with self.retired([name]):
                changed = await asyncio.to_thread(remove_tenant, store.path, name, keep_plan=True)
                await self._between_steps(lambda: self.engine.update(changed))
