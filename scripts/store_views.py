"""The same store's files as if it held other tenants or another plan. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common import Plan, Store
from common.plan.plan import plan_all


def only(store: Store, names: Sequence[str], plan: Plan) -> Store:
    """The store as if it held these tenants alone, with this plan."""
    tenants = tuple(store.tenant(name) for name in names)
    return Store(
        store.path, replace(store.manifest, tenants=tenants, plan=plan, merged={}, residuals=())
    )


def alone_store(store: Store, names: Sequence[str]) -> Store:
    """These tenants, all their own experts resident; identical ones once."""
    spec, family = store.experts, store.family
    numbers: dict[tuple[str, ...], int] = {}
    contents = np.zeros((len(names), spec.num_layers, spec.num_experts), dtype=np.int64)
    for t, name in enumerate(names):
        tenant = store.tenant(name)
        for layer, expert in np.ndindex(spec.num_layers, spec.num_experts):
            ids = tuple(
                tenant.tensors[family.expert_tensor(tenant.config, layer, expert, p)]
                for p, _ in spec.projections
            )
            contents[t, layer, expert] = numbers.setdefault(ids, len(numbers))
    return only(store, names, plan_all(contents, names))
