"""A decode step of several tenants' rows in twelve launches a layer, and one wait for its tokens.

It takes steps in which every part appends one token and no tenant can miss. Residuals take six to
eight launches a layer more. Everything else is computed by `models/decoder.py`, whose results it
equals up to rounding. On CUDA the launches of each number of rows are captured once as a graph.

Legend: rows M (padded), vocabulary V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.families import Decoder
from common.families.shape import Sparse
from torch_engine.decode.buffers import Addresses, power_of_two
from torch_engine.decode.graph import StepGraph
from torch_engine.device import why_no_triton
from torch_engine.experts.grouped_pool import GroupedPool
from torch_engine.layers.attention import kind_of
from torch_engine.layers.cache import BLOCK, Arena, Blocks
from torch_engine.products import PlainWeight
from torch_engine.tenants.weights import LayerWeights, TenantWeights

ROWS = (1, 2, 4, 8, 16, 32, 64)  # that graphs are captured for; larger steps are computed eagerly


def unsupported(shape: Decoder) -> str | None:
    """What of a shape the kernels do not compute, in words."""
    for found, what in (
        (not all(isinstance(mlp, Sparse) for mlp in shape.layers), "layers without experts"),
        (shape.attention.bias, "biases of attention"),
        (shape.experts.activation != "silu", f"the activation {shape.experts.activation}"),
        (shape.attention.head_dim % 2, "an odd head size"),
    ):
        if found:
            return what
    return None


def why_not(device: torch.device, pool: Any) -> str | None:
    """What keeps this machine, or this pool, from these kernels, in words."""
    return why_no_triton(device) or (
        None if isinstance(pool, GroupedPool) else "experts are not grouped"
    )


def _signature(shape: Decoder) -> tuple[Any, ...]:
    """What tenants must agree in to share a launch."""
    return (
        kind_of(shape.attention),
        shape.norm_eps,
        shape.scalars,
        shape.experts,
        shape.layers,
        shape.hidden,
        shape.vocab_size,
    )


class DecodeSteps:
    """Decode steps over one pool, cache and list of tenants; made anew when any of them changes.

    tenants: numbers of those that it computes. Steps have at most `ROWS[-1]` rows.
    """

    def __init__(self, pool: GroupedPool, cache: Arena, shapes: dict[str, Decoder]):
        self.pool, self.cache = pool, cache
        self.device, self.dtype = pool.device, pool.dtype
        usable = {n: s for n, s in shapes.items() if unsupported(s) is None}
        self.shape = next(iter(usable.values()), next(iter(shapes.values())))
        complete = np.logical_not(pool.can_miss.any(axis=0)).tolist()
        self.tenants = {
            name: i
            for i, name in enumerate(shapes)
            if name in usable and complete[i] and _signature(shapes[name]) == _signature(self.shape)
        }
        adding = (pool.residuals.numbers != 0).any(axis=(0, 2))
        self._adding = {name for name, i in self.tenants.items() if adding[i]}
        self._residuals = pool.residual_table if self._adding else None
        most = max(s.max_positions for s in shapes.values())
        self.max_blocks = min(-(-most // BLOCK), cache.num_blocks)
        self.max_slots = max(len(s) for s in pool.slots_of_layer)
        self._held: dict[str, tuple[TenantWeights, tuple[Tensor, Tensor]]] = {}
        self._addresses: Addresses | None = None
        self._experts = [
            torch.tensor([m.data_ptr() for m in matrices], dtype=torch.int64).to(self.device)
            for layer in zip(pool._gate_up, pool._down, strict=True)
            for matrices in layer
        ]
        self._graphs: dict[tuple[int, int, bool], StepGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.count = 0

    def run(
        self,
        weights: Mapping[str, TenantWeights],
        groups: Sequence[tuple[str, int]],
        token_ids: Sequence[int],
        lengths: Sequence[int],
        blocks: Sequence[Blocks],
    ) -> tuple[Tensor, Tensor]:
        """Append one token to each row. Returns winners int64 [rows] and logits [rows, V].

        Both are overwritten by the next step.

        Args:
            groups: tenants and the rows of each, which are adjacent.
            lengths: tokens of each row with this one, for which `blocks` have room.
        """
        rows = len(token_ids)
        last = max(lengths) - 1
        changed = False
        for name, _ in groups:
            held = weights[name]
            held.rotary.reach(last)
            held.wait(len(self.shape.layers) + 1)
            changed |= self._take(name, held)
        if changed:
            assert self._addresses is not None
            self._addresses.send()
        padded = next(r for r in ROWS if r >= rows)
        adds = not self._adding.isdisjoint(name for name, _ in groups)
        key = padded, min(padded, power_of_two(len(groups))), adds
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = StepGraph(
                self.shape,
                self.dtype,
                self.device,
                *key[:2],
                self.max_blocks,
                self.max_slots,
                self._residuals if adds else None,
            )
        positions = np.asarray(lengths) - 1
        places = [int(b.places(n - 1, n)[0]) for b, n in zip(blocks, lengths, strict=True)]
        graph.inputs.send(
            {
                "ids": token_ids,
                "positions": positions.tolist(),
                "places": places,
                "lengths": lengths,
            },
            [(self.tenants[name], count) for name, count in groups],
            [b.table[: b.count] for b in blocks],
        )
        graph.launch(lambda: self._forward(graph), self._memory)
        self.count += 1
        return graph.winners[:rows], graph.logits[:rows]

    def _take(self, name: str, weights: TenantWeights) -> bool:
        """Note where a tenant's weights lie. Returns whether that changed."""
        tables = weights.rotary.tables
        if (held := self._held.get(name)) and held[0] is weights and held[1][0] is tables[0]:
            return False
        self._held[name] = weights, tables
        found = _tensors(weights)
        if self._addresses is None:
            self._addresses = Addresses(list(found), len(self.pool.plan.tenants), self.device)
        return self._addresses.put(self.tenants[name], found)

    def _forward(self, graph: StepGraph) -> None:
        # Imported late: triton is an option.
        from torch_engine.decode.launches import forward

        assert self._addresses is not None
        forward(self.shape, graph, self._addresses.row, self._experts, self.pool, self.cache)


def _tensors(weights: TenantWeights) -> dict[str, Tensor]:
    """All of a tenant's weights that kernels read, by layer and role."""
    cos, sin = weights.rotary.tables
    found = {"embed": weights.embed, "norm": weights.norm, "cos": cos, "sin": sin}
    assert isinstance(weights.head, PlainWeight)
    found["head"] = weights.head.tensor
    for i, layer in enumerate(weights.layers):
        for each in fields(LayerWeights):
            weight = getattr(layer, each.name)
            if weight is not None:
                tensor = weight.tensor if isinstance(weight, PlainWeight) else weight
                found[f"{i}.{each.name}"] = tensor
    return found
