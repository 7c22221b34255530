"""Which tenants a step may hold, where the device has not room for all tenants' weights at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from common.serving.backend import Backend


class Turns:
    """The tenants in use. One that enters stays so long that its reconfiguration took at most
    `switch_share` of the time; then the one that was served least takes its place."""

    def __init__(self, backend: Backend, switch_share: float, served: Callable[[str], float]):
        """served: of a tenant, by the scheduler's account."""
        self._backend, self._switch_share, self._served = backend, switch_share, served
        self._in_use: list[str] = []
        self._since: dict[str, float] = {}
        self._switch_s: dict[str, float] = {}

    def choose(self, active: Sequence[str], now: float) -> list[str]:
        """Those of the tenants with requests of which the step may hold some, at most as many as
        are ready at once."""
        room = self._backend.max_ready_tenants
        if len(active) <= room:
            for name in active:
                if name not in self._in_use:
                    self._since[name] = now
            self._in_use = list(active)
            return self._in_use
        if self._backend.prefetches and room > 1:
            room -= 1  # the place into which the next tenant's weights are brought meanwhile
        kept = [n for n in self._in_use if n in active][:room]
        entering = [n for n in sorted(active, key=self._served) if n not in kept]
        while len(kept) < room:
            self._since[entering[0]] = now
            kept.append(entering.pop(0))
        over = [n for n in kept if now - self._since[n] >= self._turn_s(n)]
        for leaving in sorted(over, key=lambda n: -self._served(n)):
            if entering and self._served(entering[0]) < self._served(leaving):
                self._since[entering[0]] = now
                kept[kept.index(leaving)] = entering.pop(0)
        if entering:
            self._backend.prefetch(entering[:1])
        self._in_use = kept
        return kept

    def switched(self, name: str, seconds: float) -> None:
        """How long a tenant's last reconfiguration took."""
        self._switch_s[name] = seconds

    def forget(self, name: str) -> None:
        self._in_use = [t for t in self._in_use if t != name]
        self._since.pop(name, None)
        self._switch_s.pop(name, None)

    def _turn_s(self, name: str) -> float:
        """How long a tenant stays in use at least."""
        return self._switch_s.get(name, 0.0) / self._switch_share
