"""Tenants' non-expert weights on the device; reconfiguration is handing another tenant's to the same compiled step."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from common.families.switch_transformers import Side, SwitchTransformersConfig, as_switch
from common.store import Store
from jax_engine.model import Settings, abstract_model, split
from jax_engine.residuals import LoadedResiduals, Residuals
from jax_engine.weights import fill_tenant

Leaves = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Architecture:
    """What tenants of one shape share: the graphdef, and the structure of pool and tenant states (abstract)."""

    settings: Settings
    graphdef: Any
    pool_tree: Any
    tenant_tree: Any
    tenant_state: Any
    pool_state: Any

    @classmethod
    def of(cls, settings: Settings) -> Architecture:
        graphdef, pool, tenant = split(abstract_model(settings))
        return cls(settings, graphdef, jax.tree.structure(pool), jax.tree.structure(tenant), tenant, pool)

    def block_leaves(self, tenant: Leaves, side: Side, n: int) -> Leaves:
        """A tenant's own variables of one layer, in the order of `nnx.split(block, Expert, nnx.Param)`."""
        return tuple(jax.tree.leaves(jax.tree.unflatten(self.tenant_tree, tenant)[side][n]))

    def layer_copies(self, pool: Leaves, side: Side, n: int) -> tuple[Leaves, ...]:
        """The copies of one sparse layer, as `Dispatch` takes them."""
        flat = jax.tree.leaves(jax.tree.unflatten(self.pool_tree, pool).get(side, {}).get(n, {}))
        width = len(self.settings.config.experts.projections)
        return tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width))

    def model(self, pool: Leaves, tenant: Leaves) -> Any:
        """The module with these arrays in it; cheap enough only while tracing."""
        return nnx.merge(
            self.graphdef, jax.tree.unflatten(self.pool_tree, pool), jax.tree.unflatten(self.tenant_tree, tenant)
        )


@dataclass(frozen=True)
class ReadyTenant:
    """One tenant's state on the device.

    slot_of: int32 [layers, experts]; from the layer's slots on: a miss. residuals: the records are all tenants' own
    together, in the same arrays for each of them.
    """

    index: int
    name: str
    config: SwitchTransformersConfig
    architecture: Architecture
    leaves: Leaves
    slot_of: jax.Array
    residuals: Residuals
    vocab_size: jax.Array
    can_miss: bool

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)


class ReadyTenants:
    """Up to `capacity` tenants on the device, least recently used first out."""

    def __init__(
        self,
        store: Store,
        capacity: int,
        architecture_of: Callable[[SwitchTransformersConfig], Architecture],
        slot_of: np.ndarray,
        residuals: LoadedResiduals,
        can_miss: np.ndarray,
        put: Callable[[Any], jax.Array],
    ):
        """slot_of: int32 [tenants, layers, experts]; can_miss: bool [tenants]."""
        self._store, self.capacity, self._architecture_of = store, capacity, architecture_of
        self._slot_of, self._residuals, self._can_miss, self._put = slot_of, residuals, can_miss, put
        self.switches = 0
        self.copied_bytes = 0
        self._last: str | None = None
        self._ready: OrderedDict[str, ReadyTenant] = OrderedDict()
        for name in store.tenants[:capacity]:
            self._ready[name] = self._load(name)

    def _load(self, name: str) -> ReadyTenant:
        config = as_switch(self._store.config(name))
        architecture = self._architecture_of(config)
        state = fill_tenant(
            architecture.tenant_state,
            lambda tensor: self._store.ref(name, tensor).map(),
            architecture.settings,
            self._put,
        )
        index = self._store.tenants.index(name)
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

    def acquire(self, name: str) -> tuple[ReadyTenant, float]:
        """The tenant, loaded if it was not ready, and the seconds that this took (0 if it was in use already)."""
        start = time.perf_counter()
        if name not in self._ready:
            while len(self._ready) >= self.capacity:
                self._ready.popitem(last=False)
            self._ready[name] = self._load(name)
            self.copied_bytes += self._ready[name].nbytes
        self._ready.move_to_end(name)
        if name == self._last:
            return self._ready[name], 0.0
        self._last = name
        self.switches += 1
        return self._ready[name], time.perf_counter() - start

    @property
    def ready(self) -> list[str]:
        """Names, least recently used first."""
        return list(self._ready)

    @property
    def device_bytes(self) -> int:
        return sum(tenant.nbytes for tenant in self._ready.values())

    def close(self) -> None:
        self._ready.clear()
