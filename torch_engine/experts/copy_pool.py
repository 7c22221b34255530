"""What pools have in common that hold every copy by itself: resident ones, and missing experts that
are fetched from the store."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from typing import Generic, TypeVar

import torch
from torch import Tensor

from common.store import Store
from torch_engine.experts.pool import ExpertPool, PoolPlan, mapped

Expert = TypeVar("Expert")


class CopyPool(ExpertPool, Generic[Expert]):
    """Every copy by itself, in whatever form its products need."""

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device, spare_slots: int):
        super().__init__(store, dtype, device, spare_slots)
        self._contents = [[store.slot_content(i) for i in slots] for slots in self.slots_of_layer]
        self._resident = [
            [self._ready(mapped(store, store.slot_refs(i))) for i in slots]
            for slots in self.slots_of_layer
        ]
        self._spare: OrderedDict[tuple[int, int], Expert] = OrderedDict()

    def update(self, store: Store) -> None:
        made = PoolPlan(store)
        residuals = self.make_residuals(made)
        here = {
            content: expert
            for contents, experts in zip(self._contents, self._resident, strict=True)
            for content, expert in zip(contents, experts, strict=True)
        }
        contents = [[store.slot_content(i) for i in slots] for slots in made.slots_of_layer]
        resident = [
            [
                here.get(c) or self._ready(mapped(store, store.slot_refs(i)))
                for i, c in zip(slots, row, strict=True)
            ]
            for slots, row in zip(made.slots_of_layer, contents, strict=True)
        ]
        self._spare.clear()  # its keys are those of the old plan
        self._take_plan(made, residuals)
        self._contents, self._resident = contents, resident

    @abstractmethod
    def _ready(self, copy: dict[str, Tensor]) -> Expert:
        """A copy's matrices [out, in], by projection, ready for products."""

    def _expert(self, layer: int, key: int) -> Expert:
        """The copy that a key names, fetched into a spare slot if it is missing."""
        resident = self._resident[layer]
        if key < len(resident):
            return resident[key]
        found = self._spare.get((layer, key))
        if found is None:
            while len(self._spare) >= self.spare_slots:
                self._spare.popitem(last=False)
            found = self._spare[layer, key] = self._ready(self._missed(layer, key))
            self.counts.fetches += 1
            self.counts.fetched_bytes += self.copy_bytes
        else:
            self._spare.move_to_end((layer, key))
        return found

    @property
    def device_bytes(self) -> int:
        return (self.plan.num_slots + len(self._spare)) * self.copy_bytes

    @property
    def spare_filled(self) -> int:
        return len(self._spare)

    def close(self) -> None:
        self._resident.clear()
        self._spare.clear()
        self.residuals.close()
