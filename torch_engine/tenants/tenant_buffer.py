"""A tenant's non-expert weights as one flat buffer, which a few large copies bring to a device."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from common.families import Decoder
from torch_engine.tenants.weights import entries

# Elements: offsets stay multiples of 256 bytes, which every vector load and tensor-core product
# accepts.
ALIGNMENT = 128


@dataclass(frozen=True)
class FlatLayout:
    """Where each entry lies in a tenant's flat buffer, and where each stage ends; in elements."""

    offsets: dict[str, int]
    stage_ends: tuple[int, ...]

    @classmethod
    def of(cls, shape: Decoder, without: Collection[str] = ()) -> FlatLayout:
        """without: names of entries that lie elsewhere."""
        offsets: dict[str, int] = {}
        ends = [0] * (len(shape.layers) + 2)
        position = 0
        for entry in entries(shape):
            # A tied head is the embedding, which comes first.
            if entry.name not in without and not (shape.tied_head and entry.role == "head"):
                offsets[entry.name] = position
                position += -(-entry.elements // ALIGNMENT) * ALIGNMENT
            ends[entry.stage] = position
        return cls(offsets, tuple(ends))

    @property
    def elements(self) -> int:
        return self.stage_ends[-1]

    def views(self, shape: Decoder, buffer: Tensor) -> dict[str, Tensor]:
        """Each entry as a view of a flat buffer."""
        found = {
            e.name: buffer[self.offsets[e.name] : self.offsets[e.name] + e.elements].view(e.shape)
            for e in entries(shape)
            if e.name in self.offsets
        }
        if shape.tied_head and "embed" in found:
            found["head"] = found["embed"]
        return found
