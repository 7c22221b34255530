"""A plan for tenants that are one model with adapters: its experts as copies, residuals as the
adapters have them.

Nothing is measured or fitted, as nothing is left to choose: each expert is held once, and each
tenant's residual is its adapter's own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from common.plan.plan import MERGED, Copy, Plan
from common.plan.residual import Residual
from common.planning.losses import UNITS
from common.planning.planner import Prediction
from common.planning.policies import policy_named
from common.store.manifest import BESIDE, Manifest
from common.store.store import Store


@dataclass(frozen=True)
class AdapterPlan:
    """merged: slot of a copy that no tenant has -> projection -> object id. records: object ids of
    the plan's residuals, in order."""

    plan: Plan
    merged: Mapping[int, Mapping[str, str]]
    records: tuple[str, ...]

    def of(self, store: Store) -> Manifest:
        """The store's manifest with this plan. What it costs is nothing where experts are the same,
        and not measured beside adapters: no more than rounding."""
        prediction = None
        if not self.plan.residuals:
            prediction = Prediction(np.zeros(len(store.tenants)), UNITS[0], 0.0).to_json()
        provenance = {k: v for k, v in store.manifest.provenance.items() if k != BESIDE}
        return replace(
            store.manifest,
            plan=self.plan,
            merged=self.merged,
            residuals=self.records,
            prediction=prediction,
            provenance=provenance,
        )


def plan_adapters(policy: str, store: Store, extra_bytes: int | None) -> AdapterPlan | None:
    """The plan, or None if tenants' experts are not those of one base and its adapters.

    It is also None for a lone tenant, if the policy has no such residuals, or if they take more
    than `extra_bytes` (None: as many as they take).
    """
    spec, tenants, family = store.experts, store.manifest.tenants, store.family
    adapted = [{(a.layer, a.expert): a for a in t.adapted} for t in tenants]
    allowed = policy_named(policy).kinds.bits
    if len(tenants) < 2 or not allowed:
        return None
    copies: list[Copy] = []
    merged: dict[int, Mapping[str, str]] = {}
    residuals: list[Residual] = []
    records: list[str] = []
    for position in range(spec.num_positions):
        place = divmod(position, spec.num_experts)
        own = [
            {p: t.tensors[family.expert_tensor(t.config, *place, p)] for p, _ in spec.projections}
            for t in tenants
        ]
        found = [table.get(place) for table in adapted]
        bases = [ids if a is None else a.base for ids, a in zip(own, found, strict=True)]
        if any(base != bases[0] for base in bases[1:]):
            return None
        owners = [t for t, ids in enumerate(own) if ids == bases[0]]
        if not owners:
            merged[len(copies)] = dict(bases[0])
        copies.append(Copy(*place, owners[0] if owners else MERGED))
        for t, expert in enumerate(found):
            if expert is not None:
                residuals.append(expert.residual(t))
                records.append(expert.record)
    if any(part.bits not in allowed for r in residuals for part in r.parts):
        return None
    shapes = dict(spec.projections)
    if extra_bytes is not None and sum(r.nbytes(shapes) for r in residuals) > extra_bytes:
        return None
    slots = np.arange(spec.num_positions, dtype=np.int32)
    serving = np.tile(slots.reshape(spec.num_layers, spec.num_experts), (len(tenants), 1, 1))
    plan = Plan(
        policy,
        store.tenants,
        spec.num_layers,
        spec.num_experts,
        tuple(copies),
        serving,
        tuple(residuals),
    )
    return AdapterPlan(plan, merged, tuple(records))
