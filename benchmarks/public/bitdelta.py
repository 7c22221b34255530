"""BitDelta (arXiv 2402.10193) on experts: the base's weights, and one bit a weight for each tenant.

A tenant's difference from the base is its sign times one scale a matrix, the mean of its absolute
values (section 3.1, before distillation). Other weights are the tenant's own, which is more than
BitDelta keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common import Store, build_store
from common.plan.plan import Copy, Plan
from common.plan.residual import SIGN, Part, Residual, join_parts, pack_sign
from common.progress import Progress, silent
from common.store.change import set_plan


def build_bitdelta(
    path: Path, checkpoints: Mapping[str, Path], base: str, progress: Progress = silent
) -> Store:
    """A store in which the base's experts serve all, with one-bit differences beside them."""
    store = build_store(
        path, checkpoints, policy="round_robin", own_experts="reference", progress=progress
    )
    spec, owner = store.experts, store.tenants.index(base)
    places = list(np.ndindex(spec.num_layers, spec.num_experts))
    serving = np.arange(len(places), dtype=np.int32).reshape(spec.num_layers, spec.num_experts)
    residuals: list[Residual] = []
    records: list[np.ndarray] = []
    with progress("making one-bit differences", len(places)) as advance:
        for layer, expert in places:
            start = store.own_expert(base, layer, expert)
            for tenant, name in enumerate(store.tenants):
                if name == base:
                    continue
                own = store.own_expert(name, layer, expert)
                parts, packed = [], []
                for projection, (outputs, _) in spec.projections:
                    difference = own[projection] - start[projection]
                    if difference.any():
                        parts.append(Part(projection, SIGN, 1, outputs))
                        scale = np.array([np.abs(difference).mean(dtype=np.float64)])
                        packed.append(pack_sign(scale, difference > 0, outputs))
                if parts:
                    residuals.append(Residual(tenant, layer, expert, tuple(parts)))
                    records.append(join_parts(packed))
            advance()
    plan = Plan(
        "bitdelta",
        store.tenants,
        spec.num_layers,
        spec.num_experts,
        tuple(Copy(layer, expert, owner) for layer, expert in places),
        np.broadcast_to(serving, (len(store.tenants), *serving.shape)),
        tuple(residuals),
    )
    return set_plan(path, plan, records=records)
