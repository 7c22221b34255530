"""Ready tenants on a CPU: their weights stay where they are, so a switch copies nothing."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from common.store import Store
from torch_engine.layers.rotary import RotaryTable
from torch_engine.products import Weight
from torch_engine.tenants.ready import unchanged
from torch_engine.tenants.weights import (
    Content,
    Entry,
    TenantWeights,
    arrange,
    content_of,
    entries,
    mapped_entry,
    shape_of,
)


class TenantsInPlace:
    """Tenants on a device whose memory is the host's: made ready once, then switched by
    reference."""

    def __init__(
        self, store: Store, dtype: torch.dtype, capacity: int, product: Callable[[Tensor], Weight]
    ):
        self._store, self._dtype, self._product = store, dtype, product
        self.capacity = capacity
        self.switches = 0
        self.copied_bytes = 0
        self._last: frozenset[str] = frozenset()
        self._ready: OrderedDict[str, TenantWeights] = OrderedDict()
        self._seconds: dict[str, float] = {}
        self._made: WeakValueDictionary[tuple[bool, Content], Tensor | Weight]
        self._made = WeakValueDictionary()
        self._made_bytes = 0
        for name in store.tenants[:capacity]:
            self._ready[name] = self._load(store, name)

    def update(self, store: Store, capacity: int) -> None:
        kept = [n for n in self._ready if n in unchanged(self._store, store)]
        new = [n for n in store.tenants if n not in kept][: max(0, capacity - len(kept))]
        loaded = {name: self._load(store, name) for name in new}
        self._store, self.capacity = store, capacity
        ready = {**{n: self._ready[n] for n in kept}, **loaded}
        self._ready = OrderedDict(list(ready.items())[-capacity:])
        self._last = frozenset(n for n in self._last if n in kept)

    def _load(self, store: Store, name: str) -> TenantWeights:
        shape = shape_of(store, name)

        def once(entry: Entry) -> Tensor | Weight:
            key = entry.is_matrix, content_of(store, name, entry)
            made = self._made.get(key)
            if made is None:
                parts = mapped_entry(store, name, entry)
                plain = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self._dtype)
                made = self._product(plain) if entry.is_matrix else plain
                self._made[key] = made
                self._made_bytes += made.nbytes
            return made

        rotary = RotaryTable(shape, self._dtype, torch.device("cpu"))
        return arrange(shape, once, rotary)

    def _held_for(self, name: str) -> list[Tensor | Weight | None]:
        """What of a tenant's weights is there, as others have it too."""
        return [
            self._made.get((entry.is_matrix, content_of(self._store, name, entry)))
            for entry in entries(shape_of(self._store, name))
        ]

    def acquire(self, names: Iterable[str]) -> dict[str, TenantWeights]:
        wanted = list(dict.fromkeys(names))
        assert len(wanted) <= self.capacity
        self._seconds = {}
        found = {}
        for name in wanted:
            start = time.perf_counter()
            if name not in self._ready:
                equal = self._held_for(name)  # before who else has it goes
                while len(self._ready) >= self.capacity:
                    self._ready.pop(next(n for n in self._ready if n not in wanted))
                before = self._made_bytes
                self._ready[name] = self._load(self._store, name)
                self.copied_bytes += self._made_bytes - before
                del equal
            self._ready.move_to_end(name)
            found[name] = self._ready[name]
            if name not in self._last:
                self.switches += 1
                self._seconds[name] = time.perf_counter() - start
        self._last = frozenset(wanted)
        return found

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing: weights that are not ready are read and packed by the processor that
        computes."""

    def seconds(self) -> dict[str, float]:
        told, self._seconds = self._seconds, {}
        return told

    @property
    def ready(self) -> list[str]:
        return list(self._ready)

    @property
    def device_bytes(self) -> int:
        held = {
            id(weight): weight.nbytes for tenant in self._ready.values() for weight in tenant.all()
        }
        return sum(held.values())

    def close(self) -> None:
        self._ready.clear()
