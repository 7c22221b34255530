"""An engine that follows its store while others change it. Nothing here writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from common.errors import MoetelError
from common.serving.async_engine import AsyncEngine
from common.store.manifest import FILE

logger = logging.getLogger(__name__)

State = tuple[int, int, int]

# Seconds between two looks at a store's manifest, and before a change is tried again that the
# engine could not take.
LOOK_S, RETRY_S = 1.0, 30.0


class StoreWatch:
    """Looks whether a store's manifest was replaced, and has the engine go on with what it says.

    updates: changes that the engine took. failures: changes that could not be read or taken; the
    engine then serves what it has.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        on_change: Callable[[Collection[str], Collection[str]], None] = lambda come, gone: None,
    ):
        """on_change: called with the names of tenants that came and went."""
        self._engine, self._on_change = engine, on_change
        self._file = engine.store.path / FILE
        self._seen = _state(self._file)
        self._behind = False
        self.updates = self.failures = 0

    async def run(self) -> None:
        """Look again and again, until the engine has stopped or this is cancelled."""
        waited = 0.0
        while self._engine.healthy:
            await asyncio.sleep(LOOK_S)
            waited += LOOK_S
            state = _state(self._file)
            if state is None or (state == self._seen and waited < RETRY_S):
                continue
            if state != self._seen or self._behind:
                waited = 0.0
                await self.look()

    async def look(self) -> bool:
        """Take what the store says now. Returns whether that was something new."""
        self._seen = _state(self._file)
        before = self._engine.store
        try:
            changed = await self._engine.follow()
        except MoetelError as error:
            self._behind = True
            self.failures += 1
            logger.error("%s: changed, and is served as it was before: %s", before.path, error)
            return False
        self._behind = False
        if changed:
            self.updates += 1
            store = self._engine.store
            come = [t for t in store.tenants if t not in before.tenants]
            gone = sorted(before.departed(store))
            come += [t for t in gone if t in store.tenants]
            self._on_change(come, gone)
            logger.info(
                "%s changed: %d tenants%s%s",
                store.path,
                len(store.tenants),
                f", {', '.join(come)} came" if come else "",
                f", {', '.join(gone)} went" if gone else "",
            )
        return changed


def _state(file: Path) -> State | None:
    """Changes when the file is replaced; None while there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
