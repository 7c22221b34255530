"""What every expert pool has: resident copies in slots, spare slots for misses, look-up tables.

Legend: tokens T, experts E, top_k K, slots S of one layer, hidden H, intermediate I.
A look-up table a layer, `keys[tenant, expert]`, turns routing into keys at once: a key below S is a
slot; one from S on says which tenant's own expert to fetch (S + tenant * E + expert).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.checkpoints import TensorRef
from common.plan.plan import MISS, Plan
from common.store import Store
from torch_engine.experts.residuals import HeldResiduals
from torch_engine.experts.token_tenants import TokenTenants
from torch_engine.layers.mlp import ACTIVATIONS
from torch_engine.products import as_tensor


@dataclass
class PoolCounts:
    """Look-ups since the engine was loaded.

    fetches: misses that were not in a spare slot; prefetches: experts brought before anybody missed
        them;
    fetched_bytes: what both moved.
    """

    hits: int = 0
    misses: int = 0
    fetches: int = 0
    prefetches: int = 0
    fetched_bytes: int = 0


class PoolPlan:
    """What a pool knows of a plan beside the weights of its copies.

    can_miss: bool [layers, tenants]; where none can, nothing has to be counted or waited for.
    """

    def __init__(self, store: Store):
        self.store = store
        self.slots_of_layer, self.keys = key_tables(store.plan)
        self.can_miss = np.array(
            [(k >= len(s)).any(axis=1) for k, s in zip(self.keys, self.slots_of_layer, strict=True)]
        )
        store.hold_misses()


class ExpertPool(ABC):
    """Resident copies of every layer on one device."""

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, spare_slots: int):
        self.dtype, self.device = dtype, device
        spec = store.experts
        self.top_k = spec.top_k
        self.spare_slots = spare_slots
        self.counts = PoolCounts()
        self.activation = ACTIVATIONS[spec.activation]
        self.copy_bytes = spec.copy_elements * dtype.itemsize
        made = PoolPlan(store)
        self._take_plan(made, self.make_residuals(made))

    @abstractmethod
    def make_residuals(self, plan: PoolPlan) -> HeldResiduals:
        """A plan's residuals, ready for this pool's products."""

    def _take_plan(self, made: PoolPlan, residuals: HeldResiduals) -> None:
        self.store, self.plan = made.store, made.store.plan
        self.slots_of_layer, self.keys = made.slots_of_layer, made.keys
        self.can_miss = made.can_miss
        self.residuals: HeldResiduals = residuals

    @abstractmethod
    def update(self, store: Store) -> None:
        """Hold what another store's plan says. Copies that are here already stay; nothing changes
        if this raises."""

    @abstractmethod
    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        tenants: TokenTenants,
        misses: np.ndarray,
    ) -> Tensor:
        """The weighted sum of each token's experts.

        x: [T, H]; expert_ids: int64 [T, K]; weights: float32 [T, K], as routed. misses: int64 [T],
            added to.
        """

    def expect(self, tenant: int) -> None:  # noqa: B027 (a hint; doing nothing is right)
        """A tenant (its index) is about to enter: bring what it will miss, while others compute."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Bytes of resident copies and of filled spare slots."""

    @property
    def residual_bytes(self) -> int:
        """Bytes of all residuals, which `device_bytes` leaves out."""
        return self.residuals.nbytes

    @property
    @abstractmethod
    def spare_filled(self) -> int:
        """Number of spare slots that hold a missing expert now."""

    def _missed(self, layer: int, key: int) -> dict[str, Tensor]:
        """The tenant's own matrices that a miss key names."""
        tenant, expert = divmod(key - len(self.slots_of_layer[layer]), self.plan.num_experts)
        return mapped(self.store, self.store.copy_refs(self.plan.tenants[tenant], layer, expert))

    def _count_misses(
        self, layer: int, keys: np.ndarray, tenants: TokenTenants, misses: np.ndarray
    ) -> None:
        if tenants.single is not None and not self.can_miss[layer, tenants.single]:
            return
        missed = (keys >= len(self.slots_of_layer[layer])).sum(axis=1)
        misses += missed
        self.counts.misses += int(missed.sum())

    @abstractmethod
    def close(self) -> None:
        """Drop the weights."""


def mapped(store: Store, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
    """A copy's matrices as views of the store's files."""
    return {projection: as_tensor(store.objects.map(ref)) for projection, ref in refs.items()}


def key_tables(plan: Plan) -> tuple[list[list[int]], list[np.ndarray]]:
    """For each layer: the plan's copies in slot order, and keys int64 [tenants, experts]."""
    slots_of_layer: list[list[int]] = [[] for _ in range(plan.num_layers)]
    local = np.zeros(max(1, plan.num_slots), dtype=np.int64)
    for index, copy in enumerate(plan.copies):
        local[index] = len(slots_of_layer[copy.layer])
        slots_of_layer[copy.layer].append(index)
    tables = []
    for layer in range(plan.num_layers):
        serving = plan.serving[:, layer]
        own = len(slots_of_layer[layer]) + np.arange(serving.size).reshape(serving.shape)
        tables.append(np.where(serving == MISS, own, local[serving]).astype(np.int64))
    return slots_of_layer, tables
