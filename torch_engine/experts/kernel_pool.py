"""The pool of a CPU with our own kernels: a layer's experts are one call.

Legend: tokens T, top_k K, slots S of one layer, spare ones counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from common.kernels.packed_weights import FIELDS, blocked_part, part_fields
from common.plan.residual import Residual
from common.store import Store
from torch_engine import native
from torch_engine.experts.copy_pool import CopyPool
from torch_engine.experts.pool import PoolPlan
from torch_engine.experts.residuals import PROJECTIONS
from torch_engine.experts.token_tenants import TokenTenants, looked_up

Matrices = tuple[Tensor, Tensor, Tensor]
"""Packed gate, up and down matrices of one copy."""


def laid_out(
    rows: Mapping[int, tuple[Residual, np.ndarray]],
    numbers: int,
    shapes: dict[str, tuple[int, ...]],
) -> native.Residuals:
    """A layer's residuals for the kernels.

    Args:
        rows: by number, a residual and its record as the store has it, uint8 [bytes].
        numbers: how many numbers there are.
        shapes: of the projections' matrices, [out, in].
    """
    most = max(len(residual.parts) for residual, _ in rows.values())
    table = np.zeros((numbers, len(PROJECTIONS), most, FIELDS), dtype=np.int32)
    pieces: list[np.ndarray] = []
    words = 0
    for number, (residual, record) in rows.items():
        filled = dict.fromkeys(PROJECTIONS, 0)
        starts: list[int] = []
        for part, offset in zip(residual.parts, residual.offsets(shapes), strict=False):
            name, shape = part.projection, shapes[part.projection]
            data = record[offset : offset + part.nbytes(shape)]
            pieces.append(blocked_part(data, part.kind, part.size, shape))
            starts.append(words)
            fields = part_fields(part.kind, part.bits, part.size, shape[1], starts, part.like)
            table[number, PROJECTIONS.index(name), filled[name]] = fields
            filled[name] += 1
            words += len(pieces[-1]) // 4
    return native.Residuals(table, torch.from_numpy(np.concatenate(pieces)))


class KernelResiduals:
    """All tenants' residuals as the kernels read them.

    numbers: for each layer int32 [tenants, experts], what the kernels are told: slot + S * i, with
        i 0 where a tenant adds nothing, else which of the slot's residuals; -1 where it misses.
    layers: for each layer its table and records, None where no tenant has any.
    """

    def __init__(self, plan: PoolPlan, spare_slots: int):
        shapes = dict(plan.store.experts.projections)
        self.numbers: list[np.ndarray] = []
        self.layers: list[native.Residuals | None] = []
        residuals = plan.store.plan.residuals
        for layer, keys in enumerate(plan.keys):
            resident = len(plan.slots_of_layer[layer])
            slots = resident + spare_slots
            numbers = np.where(keys < resident, keys, -1).astype(np.int32)
            of_slot = np.zeros(slots, dtype=np.int64)
            rows: dict[int, tuple[Residual, np.ndarray]] = {}
            for i, residual in enumerate(residuals):
                if residual.layer != layer or not residual.parts:
                    continue
                slot = keys[residual.tenant, residual.expert]
                of_slot[slot] += 1
                number = int(slot + slots * of_slot[slot])
                numbers[residual.tenant, residual.expert] = number
                rows[number] = residual, plan.store.residual_ref(i).map()
            self.numbers.append(numbers)
            count = slots * (1 + int(of_slot.max()))
            self.layers.append(laid_out(rows, count, shapes) if rows else None)

    @property
    def nbytes(self) -> int:
        return sum(layer.records.numel() for layer in self.layers if layer is not None)

    def close(self) -> None:
        self.layers.clear()


class KernelPool(CopyPool[Matrices]):
    """Copies packed for our own kernels."""

    residuals: KernelResiduals

    def __init__(self, store: Store, dtype: torch.dtype, spare_slots: int, kernels: native.Kernels):
        super().__init__(store, dtype, torch.device("cpu"), spare_slots)
        self._kernels = kernels
        self._addresses = self._find_addresses()

    def make_residuals(self, plan: PoolPlan) -> KernelResiduals:
        return KernelResiduals(plan, self.spare_slots)

    def update(self, store: Store) -> None:
        super().update(store)
        self._addresses = self._find_addresses()

    def _ready(self, copy: dict[str, Tensor]) -> Matrices:
        gate, up, down = (native.pack(copy[p].to(self.dtype)) for p in PROJECTIONS)
        return gate, up, down

    def _find_addresses(self) -> list[np.ndarray]:
        """For each layer uint64 [S, 3], where the resident copies' matrices lie; 0 for spare
        slots."""
        found = []
        for resident in self._resident:
            found.append(np.zeros((len(resident) + self.spare_slots, 3), dtype=np.uint64))
            for slot, matrices in enumerate(resident):
                found[-1][slot] = native.addresses(matrices)
        return found

    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        tenants: TokenTenants,
        misses: np.ndarray,
    ) -> Tensor:
        ids = expert_ids.numpy()
        chosen = looked_up(self.residuals.numbers[layer], ids, tenants)
        if tenants.single is not None and not self.can_miss[layer, tenants.single]:
            return self._experts(layer, x, chosen, weights, self._addresses[layer])
        keys = looked_up(self.keys[layer], ids, tenants)
        self._count_misses(layer, keys, tenants, misses)
        num_resident = len(self._resident[layer])
        missing = np.unique(keys[keys >= num_resident]).tolist()
        if not missing:
            return self._experts(layer, x, chosen, weights, self._addresses[layer])
        # As many missing experts a call as there are spare slots; the resident ones in the first.
        out: Tensor | None = None
        for first in range(0, len(missing), self.spare_slots):
            now = missing[first : first + self.spare_slots]
            # Held here until the call returns: a fetch may push out what an earlier one brought.
            fetched = [self._expert(layer, key) for key in now]
            numbers = chosen.copy() if out is None else np.full_like(chosen, -1)
            for i, key in enumerate(now):
                numbers[keys == key] = num_resident + i
            addresses = self._addresses[layer].copy()
            for i, matrices in enumerate(fetched):
                addresses[num_resident + i] = native.addresses(matrices)
            part = self._experts(layer, x, numbers, weights, addresses)
            out = part if out is None else out.add_(part)
        assert out is not None
        return out

    def _experts(
        self, layer: int, x: Tensor, chosen: np.ndarray, weights: Tensor, addresses: np.ndarray
    ) -> Tensor:
        return native.experts(
            self._kernels,
            x,
            np.ascontiguousarray(chosen),
            weights,
            addresses,
            self.store.experts.intermediate_size,
            self.store.experts.activation,
            self.residuals.layers[layer],
        )
