"""What ready tenants are to the engine: those whose non-expert weights it can compute with now.

Fine-tunes often leave part of a model as it was: adapters that touch attention alone leave
embeddings, norms and head. Such weights, equal by content, are held once for all tenants that have
them, and a switch does not copy them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from common.store import Store
from torch_engine.tenants.weights import TenantWeights


def unchanged(old: Store, new: Store) -> set[str]:
    """Tenants that both stores have with the same non-expert weights."""
    return {
        n
        for n in old.tenants
        if n in new.tenants and old.tenant_content(n) == new.tenant_content(n)
    }


class ReadyTenants(Protocol):
    """Which tenants' weights the device can compute with now."""

    capacity: int
    switches: int
    copied_bytes: int

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        """Make these tenants ready, at most `capacity` of them; others may be dropped, least
        recently used first."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to make tenants ready without waiting, where there is a place that the last
        `acquire` left free."""
        ...

    def update(self, store: Store, capacity: int) -> None:
        """Serve another store's tenants; those that did not change stay ready. Nothing changes if
        this raises."""
        ...

    def seconds(self) -> dict[str, float]:
        """What making tenants ready took, of those that came into use and were not told yet.

        It waits for nothing: on CUDA a time is known, and told, once the copy has arrived.
        """
        ...

    @property
    def ready(self) -> list[str]:
        """Names, least recently used first."""
        ...

    @property
    def device_bytes(self) -> int: ...

    def close(self) -> None: ...
