"""The pool that computes one copy after another, with torch's products; the host reads routing.

Legend: tokens T, top_k K, hidden H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_engine.experts.copy_pool import CopyPool
from torch_engine.experts.pool import PoolPlan
from torch_engine.experts.residuals import (
    ResidentResiduals,
    RowResidual,
    add_residuals,
    residuals_within,
)
from torch_engine.experts.token_tenants import TokenTenants, groups_of, looked_up
from torch_engine.products import PlainWeight, Weight


@dataclass(frozen=True)
class _Expert:
    """One copy. gate_up: [2I, H], gate first; down: [H, I]."""

    gate_up: Weight
    down: Weight


class LoopPool(CopyPool[_Expert]):
    """Products of torch, for any device."""

    residuals: ResidentResiduals

    def make_residuals(self, plan: PoolPlan) -> ResidentResiduals:
        return ResidentResiduals(plan.store, self.device)

    def _ready(self, copy: dict[str, Tensor]) -> _Expert:
        gate_up = torch.cat((copy["gate"], copy["up"])).to(self.device, self.dtype)
        return _Expert(PlainWeight(gate_up), PlainWeight(copy["down"].to(self.device, self.dtype)))

    def _feed_forward(
        self, expert: _Expert, x: Tensor, residuals: Sequence[RowResidual] = ()
    ) -> Tensor:
        """[rows, H] -> [rows, H]. residuals: in rows of x."""
        gate, up = expert.gate_up.multiply(x).chunk(2, dim=-1)
        add_residuals(residuals, "gate", x, gate)
        add_residuals(residuals, "up", x, up)
        inner = self.activation(gate).mul_(up)
        out = expert.down.multiply(inner)
        add_residuals(residuals, "down", inner, out)
        return out

    def forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        tenants: TokenTenants,
        misses: np.ndarray,
    ) -> Tensor:
        ids = expert_ids.cpu().numpy()
        keys = looked_up(self.keys[layer], ids, tenants)
        self._count_misses(layer, keys, tenants, misses)
        numbers = self.residuals.numbers_of(layer, ids, tenants)
        # Rows sorted by key and, in a key, by residual.
        both = keys.reshape(-1)
        if numbers is not None:
            both = both * (len(self.residuals.items) + 1) + numbers.reshape(-1)
        order = np.argsort(both, kind="stable")
        groups = groups_of(keys.reshape(-1)[order])
        residuals = (
            [] if numbers is None else self.residuals.rows(numbers.reshape(-1)[order], both[order])
        )
        if len(x) == 1:
            out: Tensor | None = None
            for row, (key, start, stop) in sorted(zip(order.tolist(), groups, strict=True)):
                part = self._feed_forward(
                    self._expert(layer, key), x, residuals_within(residuals, start, stop)
                )
                part.mul_(float(weights[0, row]))
                out = part if out is None else out.add_(part)
            assert out is not None
            return out
        by_key = x.index_select(0, torch.from_numpy(order // self.top_k).to(self.device))
        parts = [
            self._feed_forward(
                self._expert(layer, key),
                by_key[start:stop],
                residuals_within(residuals, start, stop),
            )
            for key, start, stop in groups
        ]
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        by_token = torch.cat(parts).index_select(0, torch.from_numpy(inverse).to(self.device))
        return by_token.view(len(x), self.top_k, -1).mul_(weights[..., None].to(x.dtype)).sum(dim=1)
