"""The expert pool: resident copies, loaded once, and spare slots for misses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.consolidation import MISS, Plan
from common.store import Store
from jax_engine.model import Settings
from jax_engine.tenants import Architecture, Leaves
from jax_engine.weights import fill_pool, pack_copy


def slots_of_plan(plan: Plan) -> tuple[list[list[int]], np.ndarray]:
    """Where each copy lies, and who uses which.

    Returns, a list for each layer, the index into `plan.copies` of every slot; and int32 [tenants, layers, experts]:
    the slot in its layer that serves, or, for a miss, the layer's number of slots + expert.
    """
    layers: list[list[int]] = [[] for _ in range(plan.num_layers)]
    place = np.zeros(len(plan.copies) + 1, dtype=np.int32)
    for number, copy in enumerate(plan.copies):
        place[number] = len(layers[copy.layer])
        layers[copy.layer].append(number)
    misses = np.array([len(slots) for slots in layers], dtype=np.int32)[:, None] + np.arange(plan.num_experts)
    return layers, np.where(plan.serving == MISS, misses[None], place[plan.serving]).astype(np.int32)


class ExpertPool:
    """Resident copies as leaves of the model's pool state, in the form that the dispatch wants."""

    def __init__(
        self,
        store: Store,
        architecture: Architecture,
        layers: list[list[int]],
        spare_slots: int,
        put: Callable[[Any], jax.Array],
        put_spare: Callable[[Any], jax.Array],
    ):
        self._store, self._layers = store, layers
        self._settings: Settings = architecture.settings
        self._put_spare = put_spare

        def read(layer: int, slot: int, projection: str) -> np.ndarray:
            if slot >= len(layers[layer]):  # stacked slots are padded to a multiple of the mesh's axis
                return np.zeros(dict(store.experts.projections)[projection], np.float32)
            return store.slot_refs(layers[layer][slot])[projection].map()

        self.leaves: Leaves = tuple(jax.tree.leaves(fill_pool(architecture.pool_state, read, self._settings, put)))
        # Mapped now, so that a damaged store is found before the first request, and a replaced one does no harm.
        self._missing = {
            (int(tenant), int(layer), int(expert)): [
                ref.map() for ref in store.copy_refs(store.tenants[tenant], int(layer), int(expert)).values()
            ]
            for tenant, layer, expert in np.argwhere(store.plan.serving == MISS)
        }
        self.spare_slots = spare_slots
        self._spare: OrderedDict[tuple[int, int, int], tuple[jax.Array, ...]] = OrderedDict()
        self.hits = self.misses = self.fetches = self.fetched_bytes = 0

    def num_slots(self, layer: int) -> int:
        """Resident copies of a layer; a slot number from here on is a miss."""
        return len(self._layers[layer])

    def expert_of_slot(self, layer: int) -> np.ndarray:
        """int64 [slots + experts]: the expert that each slot number of a layer stands for, misses included."""
        plan = self._store.plan
        resident = [plan.copies[number].expert for number in self._layers[layer]]
        return np.array([*resident, *range(plan.num_experts)], dtype=np.int64)

    def fetch(self, tenant: int, layer: int, expert: int) -> tuple[jax.Array, ...]:
        """A tenant's own expert, from a spare slot or from the store into one."""
        key = (tenant, layer, expert)
        if key not in self._spare:
            while len(self._spare) >= self.spare_slots:
                self._spare.popitem(last=False)
            if self._settings.dispatch.stacked:
                packed: list[Any] = [self._settings.products.prepare(m)[None] for m in self._missing[key]]
            else:
                packed = pack_copy(self._missing[key], self._settings.products)
            self._spare[key] = tuple(self._put_spare(jnp.asarray(m)) for m in packed)
            self.fetches += 1
            self.fetched_bytes += sum(m.nbytes for m in self._spare[key])
        self._spare.move_to_end(key)
        return self._spare[key]

    @property
    def spare_filled(self) -> int:
        return len(self._spare)

    @property
    def device_bytes(self) -> int:
        """Bytes of resident copies and of filled spare slots."""
        spare = sum(m.nbytes for copy in self._spare.values() for m in copy)
        return sum(leaf.nbytes for leaf in self.leaves) + spare

    def close(self) -> None:
        self.leaves = ()
        self._spare.clear()
        self._missing.clear()
