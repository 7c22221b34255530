"""Tenants' non-expert weights on the device; reconfiguration is handing another tenant's to the
same compiled step.

Variables that tenants have equal, as fine-tunes have that leave a part of the model as it was, are
on the device once.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import jax
import numpy as np
from flax import nnx

from common.families import ModelConfig
from common.store import Store
from jax_engine.experts.residuals import LoadedResiduals, Residuals
from jax_engine.layers.variables import Source
from jax_engine.models.architecture import Architecture, Leaves
from jax_engine.tenants.weights import fill_tenant

VariableKey = tuple[tuple[str, ...], bool, int]
"""What a variable holds: hashes of its tensors, whether they are packed, and the rows that
embeddings are filled up to."""


@dataclass(frozen=True)
class ReadyTenant:
    """One tenant's state on the device.

    slot_of: int32 [sparse layers, experts]; from the layer's slots on: a miss.
    residuals: the records are all tenants' own together, in the same arrays for each of them.
    """

    index: int
    name: str
    config: ModelConfig
    architecture: Architecture
    leaves: Leaves
    slot_of: jax.Array
    residuals: Residuals
    vocab_size: jax.Array
    can_miss: bool
    _layers: dict[int, Leaves] = field(default_factory=dict, compare=False, repr=False)

    def layer(self, n: int) -> Leaves:
        """The variables of one layer, see `Architecture.block_leaves`."""
        if n not in self._layers:
            self._layers[n] = self.architecture.block_leaves(self.leaves, n)
        return self._layers[n]

    @cached_property
    def outer(self) -> Leaves:
        """The variables of no layer."""
        return self.architecture.outer_leaves(self.leaves)

    @cached_property
    def slots(self) -> tuple[np.ndarray, ...]:
        """int32 [experts] of each sparse layer: `slot_of`'s rows."""
        return tuple(np.array(self.slot_of))


class DeviceTenants:
    """Up to `capacity` tenants on the device, least recently used first out."""

    switches: int
    copied_bytes: int

    def __init__(
        self,
        store: Store,
        capacity: int,
        architecture_of: Callable[[str], Architecture],
        slot_of: np.ndarray,
        residuals: LoadedResiduals,
        can_miss: np.ndarray,
        put: Callable[[Any], jax.Array],
        before: DeviceTenants | None = None,
    ):
        """Load as many tenants as are ready at once.

        Args:
            architecture_of: that of a tenant, by name.
            slot_of: int32 [tenants, sparse layers, experts].
            can_miss: bool [tenants].
            before: of the store's last state, whose weights are taken over where they are the same.
        """
        self._store, self.capacity, self._architecture_of = store, capacity, architecture_of
        self._slot_of, self._can_miss = slot_of, can_miss
        self._residuals, self._put = residuals, put
        self.switches = before.switches if before else 0
        self.copied_bytes = before.copied_bytes if before else 0
        self._in_use: set[str] = set(before._in_use) & set(store.tenants) if before else set()
        self._ready: OrderedDict[str, ReadyTenant] = OrderedDict()
        self._made: WeakValueDictionary[VariableKey, jax.Array] = WeakValueDictionary()
        if before is not None:
            self._made.update(before._made)
        self._made_bytes = 0
        # Those that were used last come last, and stay longest.
        order = [n for n in before._ready if n in store.tenants][-capacity:] if before else []
        names = [*[n for n in store.tenants if n not in order][: capacity - len(order)], *order]
        for name in names:
            self._ready[name] = self._load(name)

    def _load(self, name: str) -> ReadyTenant:
        config, index = self._store.config(name), self._store.tenants.index(name)
        architecture = self._architecture_of(name)

        def once(
            sources: tuple[Source, ...], packed: bool, make: Callable[[], jax.Array]
        ) -> jax.Array:
            key = self._key(name, architecture, sources, packed)
            made = self._made.get(key)
            if made is None:
                made = self._made[key] = make()
                self._made_bytes += made.nbytes
            return made

        def read(source: Source) -> np.ndarray:
            return self._store.ref(name, self._store.family.tensor_name(config, *source)).map()

        state = fill_tenant(architecture.tenant_state, read, architecture.spec, self._put, once)
        return ReadyTenant(
            index=index,
            name=name,
            config=config,
            architecture=architecture,
            leaves=tuple(jax.tree.leaves(state)),
            slot_of=self._put(self._slot_of[index]),
            residuals=self._residuals.of(index),
            vocab_size=self._put(np.int32(config.vocab_size)),
            can_miss=bool(self._can_miss[index]),
        )

    def _key(
        self, name: str, architecture: Architecture, sources: Sequence[Source], packed: bool
    ) -> VariableKey:
        config, tensors = self._store.config(name), self._store.tenant(name).tensors
        names = (self._store.family.tensor_name(config, *source) for source in sources)
        return tuple(tensors[n] for n in names), packed, architecture.spec.vocab_size

    def _held_for(self, name: str) -> list[jax.Array | None]:
        """What of a tenant's variables is there, as others have it too."""
        architecture = self._architecture_of(name)
        each = [
            variable.get_metadata() for _, variable in nnx.to_flat_state(architecture.tenant_state)
        ]
        return [
            self._made.get(self._key(name, architecture, data["sources"], data["packed"]))
            for data in each
        ]

    def acquire(self, names: Iterable[str]) -> tuple[dict[str, ReadyTenant], dict[str, float]]:
        """Make these tenants the ones in use.

        Args:
            names: at most `capacity` different ones.
        Returns:
            The tenants, and the seconds that it took for each that was not in use.
        """
        wanted = dict.fromkeys(names)
        assert len(wanted) <= self.capacity, "more tenants than are ready at once"
        for name in wanted:
            if name in self._ready:
                self._ready.move_to_end(name)  # not to be dropped for one of the others
        took: dict[str, float] = {}
        for name in wanted:
            start = time.perf_counter()
            if name not in self._ready:
                equal = self._held_for(name)  # before who else has it goes
                while len(self._ready) >= self.capacity:
                    self._ready.popitem(last=False)
                before = self._made_bytes
                self._ready[name] = self._load(name)
                self.copied_bytes += self._made_bytes - before
                del equal
            self._ready.move_to_end(name)
            if name not in self._in_use:
                self.switches += 1
                took[name] = time.perf_counter() - start
        self._in_use = set(wanted)
        return {name: self._ready[name] for name in wanted}, took

    @property
    def ready(self) -> list[str]:
        """Names, least recently used first."""
        return list(self._ready)

    @property
    def device_bytes(self) -> int:
        held = {id(leaf): leaf.nbytes for tenant in self._ready.values() for leaf in tenant.leaves}
        return sum(held.values())

    def close(self) -> None:
        self._ready.clear()
