"""The expert pool: resident copies, loaded once, and spare slots for misses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.plan.plan import MISS, Plan
from common.store import Store
from jax_engine.models.architecture import Architecture, Leaves
from jax_engine.tenants.weights import fill_pool, pack_copy


def slots_of_plan(plan: Plan) -> tuple[list[list[int]], np.ndarray]:
    """Where each copy lies, and who uses which.

    Returns, a list for each layer, the index into `plan.copies` of every slot; and int32 [tenants,
    layers, experts]: the slot in its layer that serves, or, for a miss, the layer's number of slots
    + expert.
    """
    layers: list[list[int]] = [[] for _ in range(plan.num_layers)]
    place = np.zeros(len(plan.copies) + 1, dtype=np.int32)
    for number, copy in enumerate(plan.copies):
        place[number] = len(layers[copy.layer])
        layers[copy.layer].append(number)
    misses = np.array([len(slots) for slots in layers], dtype=np.int32)[:, None] + np.arange(
        plan.num_experts
    )
    return layers, np.where(plan.serving == MISS, misses[None], place[plan.serving]).astype(
        np.int32
    )


CopyContent = tuple[str, ...]
"""What a copy is: the ids of its objects in the store, in the order of the projections."""


class DevicePool:
    """Resident copies as leaves of the model's pool state, in the form that the dispatch wants."""

    def __init__(
        self,
        store: Store,
        architecture: Architecture,
        layers: list[list[int]],
        spare_slots: int,
        put: Callable[[Any], jax.Array],
        put_spare: Callable[[Any], jax.Array],
        before: DevicePool | None = None,
    ):
        """before: the pool of the store's last state, whose copies are taken over where they are
        the same."""
        self._store, self._layers = store, layers
        self._spec = architecture.spec
        self._put_spare = put_spare
        self._names = [name for name, _ in store.experts.projections]
        self._contents = [[store.slot_content(number) for number in slots] for slots in layers]

        def read(layer: int, slot: int, projection: str) -> np.ndarray:
            if slot >= len(
                layers[layer]
            ):  # stacked slots are padded to a multiple of the mesh's axis
                return np.zeros(dict(store.experts.projections)[projection], np.float32)
            if before is not None and before._spec.dispatch.stacked:
                stacked = before._stacked(self._contents[layer][slot], projection)
                if stacked is not None:
                    return stacked
            return store.objects.map(store.slot_refs(layers[layer][slot])[projection])

        def kept(layer: int, slot: int | None, projection: str) -> jax.Array | None:
            if before is None:
                return None
            if slot is None:
                same = (
                    before._contents[layer] == self._contents[layer]
                    and before.slots[layer] == self.slots[layer]
                )
                return before._leaf(layer, None, projection) if same else None
            return before._resident(self._contents[layer][slot], projection)

        state = fill_pool(architecture.pool_state, read, self._spec, put, kept)
        self.leaves: Leaves = tuple(jax.tree.leaves(state))
        self.copies = [
            architecture.layer_copies(self.leaves, n) for n in self._spec.shape.sparse_layers
        ]
        store.hold_misses()
        self._store = store
        self.spare_slots = spare_slots
        wanted = {
            store.own_content(store.tenants[tenant], layer, expert)
            for tenant, layer, expert in np.argwhere(store.plan.serving == MISS).tolist()
        }
        self._spare: OrderedDict[CopyContent, tuple[jax.Array, ...]] = OrderedDict(
            (content, copy)
            for content, copy in (before._spare.items() if before else ())
            if content in wanted
        )
        self.hits = self.misses = self.fetches = self.fetched_bytes = 0
        if before is not None:
            self.hits, self.misses = before.hits, before.misses
            self.fetches, self.fetched_bytes = before.fetches, before.fetched_bytes

    @property
    def slots(self) -> tuple[int, ...]:
        """Places of each layer on the device, padding included."""
        return self._spec.slots

    def _leaf(self, layer: int, slot: int | None, projection: str) -> jax.Array:
        """The array that holds a projection of a slot, or of all slots of a stacked layer."""
        return self.copies[layer][slot or 0][self._names.index(projection)]

    def _resident(self, content: CopyContent, projection: str) -> jax.Array | None:
        """The packed projection of a copy that some slot has."""
        for layer, contents in enumerate(self._contents):
            if content in contents:
                return self._leaf(layer, contents.index(content), projection)
        return None

    def _stacked(self, content: CopyContent, projection: str) -> np.ndarray | None:
        """The same of stacked slots, taken off the device."""
        for layer, contents in enumerate(self._contents):
            if content in contents:
                return np.asarray(self._leaf(layer, None, projection)[contents.index(content)])
        return None

    def num_slots(self, layer: int) -> int:
        """Resident copies of a layer; a slot number from here on is a miss."""
        return len(self._layers[layer])

    def expert_of_slot(self, layer: int) -> np.ndarray:
        """int64 [slots + experts]: the expert that each slot number of a layer stands for, misses
        included."""
        plan = self._store.plan
        resident = [plan.copies[number].expert for number in self._layers[layer]]
        return np.array([*resident, *range(plan.num_experts)], dtype=np.int64)

    def fetch(self, tenant: int, layer: int, expert: int) -> tuple[jax.Array, ...]:
        """A tenant's own expert, from a spare slot or from the store into one."""
        name = self._store.tenants[tenant]
        content = self._store.own_content(name, layer, expert)
        if content not in self._spare:
            refs = self._store.copy_refs(name, layer, expert)
            matrices = [self._store.objects.map(ref) for ref in refs.values()]
            while len(self._spare) >= self.spare_slots:
                self._spare.popitem(last=False)
            if self._spec.dispatch.stacked:
                packed: list[Any] = [self._spec.products.prepare(m)[None] for m in matrices]
            else:
                packed = pack_copy(matrices, self._spec.products)
            self._spare[content] = tuple(self._put_spare(jnp.asarray(m)) for m in packed)
            self.fetches += 1
            self.fetched_bytes += sum(m.nbytes for m in self._spare[content])
        self._spare.move_to_end(content)
        return self._spare[content]

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
        self.copies.clear()
        self._spare.clear()
