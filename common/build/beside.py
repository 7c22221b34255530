"""Changes of a store that leave all other tenants as they are: their copies, what these hold, and
their residuals.

Planning anew may change every copy and so every tenant's answers. Here a tenant that joins is
served by copies that are resident already, with residuals of its own where they pay, and a tenant
that leaves takes along what nobody else uses.
Both are worse than a new plan, which is made of all tenants: the manifest's provenance says who
came and went since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from common.dtypes import BY_NAME, to_float32
from common.plan.adapted import AdaptedExpert
from common.plan.distance import compare
from common.plan.plan import MERGED, MISS, Copy, Plan
from common.plan.residual import Part, Residual, join_parts
from common.planning.allocation import Allocator
from common.planning.configurations import Config
from common.planning.losses import UNITS
from common.planning.residual_curves import Kinds, choose, curves
from common.planning.residual_fit import Choice, Spectrum, fit, spectrum
from common.planning.weighting import plain
from common.progress import Progress
from common.store.manifest import BESIDE, Manifest
from common.store.store import Store

Place = tuple[int, int]


def join(
    old: Store,
    draft: Store,
    kinds: Kinds,
    extra_bytes: int,
    put: Callable[[np.ndarray], str],
    progress: Progress,
) -> Manifest:
    """The store `old` with the last tenant of `draft` beside its plan.

    draft: the same directory with all tensors of all tenants, the new one last; its plan is not
        looked at.
    kinds, extra_bytes: of the new tenant's residuals. put: stores a residual's record and lists it
        as an object.

    The new tenant is served by the resident copy that is nearest to its own expert, and misses
    where there is none. Weights are read one position at a time and compared with their checksums.
    Raises StoreError for a damaged file.
    """
    plan = old.plan
    serving, squared = _nearest(old, draft, progress)
    residuals, records = list(plan.residuals), list(old.manifest.residuals)
    for adapted in _adapted(old, draft, serving, kinds, extra_bytes):
        residuals.append(adapted.residual(len(draft.tenants) - 1))
        records.append(adapted.record)
        squared[adapted.layer, adapted.expert] = 0
        extra_bytes -= residuals[-1].nbytes(dict(old.experts.projections))
    for residual, record, left in _residuals(
        old, draft, serving, squared, kinds, extra_bytes, progress
    ):
        residuals.append(residual)
        records.append(put(record))
        squared[residual.layer, residual.expert] = left
    found = Plan(
        plan.policy,
        draft.tenants,
        plan.num_layers,
        plan.num_experts,
        tuple(replace(copy, mix=(*copy.mix, 0.0)) if copy.mix else copy for copy in plan.copies),
        np.concatenate([plan.serving, serving[None]]),
        tuple(residuals),
    )
    prediction = None
    if old.manifest.prediction is not None:
        # A squared distance is known; nats of a tenant that was never run are not.
        known = old.manifest.prediction["unit"] == UNITS[0]
        loss = float(squared.sum()) * old.experts.top_k / old.experts.num_experts
        losses = [*old.manifest.prediction["losses"], loss if known else None]
        prediction = {**old.manifest.prediction, "losses": losses, "bound": None}
    added, removed = came_and_went(old)
    return replace(
        draft.manifest,
        plan=found,
        merged=old.manifest.merged,
        residuals=tuple(records),
        calibration=old.manifest.calibration,
        # Without use until the tenant has gone again, which their key tells.
        measurements=old.manifest.measurements,
        prediction=prediction,
        provenance=_provenance(old, draft, [*added, draft.tenants[-1]], removed),
    )


def leave(old: Store, draft: Store, name: str) -> Manifest:
    """The store `old` without a tenant. draft: the same directory with all tensors of the tenants
    that stay.

    A copy of the tenant's own that serves others stays as it is: it becomes that of a tenant whose
    expert is bit for bit the same, or else one without an owner. Copies that serve nobody are
    dropped; the order of slots stays.
    """
    plan, gone = old.plan, old.tenants.index(name)
    stay = [t for t in range(len(plan.tenants)) if t != gone]
    used = np.unique(plan.serving[stay])
    used = used[used != MISS]
    number = np.full(
        plan.num_slots + 1, MISS, dtype=np.int32
    )  # the last one, which MISS looks up, stays a miss
    number[used] = np.arange(len(used), dtype=np.int32)
    copies: list[Copy] = []
    merged: dict[int, Mapping[str, str]] = {}
    for slot in used.tolist():
        copy = _without_tenant(old, plan.copies[slot], gone)
        if copy.owner == MERGED:
            merged[len(copies)] = _slot_ids(old, slot)
        copies.append(copy)
    kept = [
        (r, record)
        for r, record in zip(plan.residuals, old.manifest.residuals, strict=True)
        if r.tenant != gone
    ]
    found = Plan(
        plan.policy,
        draft.tenants,
        plan.num_layers,
        plan.num_experts,
        tuple(copies),
        number[plan.serving[stay]],
        tuple(replace(r, tenant=_shifted(r.tenant, gone)) for r, _ in kept),
    )
    prediction = None
    if old.manifest.prediction is not None:
        losses = [loss for t, loss in enumerate(old.manifest.prediction["losses"]) if t != gone]
        prediction = {**old.manifest.prediction, "losses": losses, "bound": None}
    added, removed = came_and_went(old)
    if name in added:
        added.remove(name)
    else:
        removed.append(name)
    return replace(
        draft.manifest,
        plan=found,
        merged=merged,
        residuals=tuple(record for _, record in kept),
        calibration={n: measured for n, measured in old.manifest.calibration.items() if n != name},
        measurements=old.manifest.measurements,
        prediction=prediction,
        provenance=_provenance(old, draft, added, removed),
    )


def came_and_went(store: Store) -> tuple[list[str], list[str]]:
    """Tenants added and removed since the store was planned."""
    beside = store.manifest.provenance.get(BESIDE, {})
    return list(beside.get("added", ())), list(beside.get("removed", ()))


def _nearest(old: Store, draft: Store, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """For the last tenant of `draft`: the nearest resident copy of each position, int32 [layers,
    experts], and the squared L2 distance to it, float64 [layers, experts], 0 where it is the
    tenant's own bit for bit or a miss."""
    spec = old.experts
    serving = np.full((spec.num_layers, spec.num_experts), MISS, dtype=np.int32)
    squared = np.zeros(serving.shape)
    resident: dict[Place, list[int]] = {}
    for slot, copy in enumerate(old.plan.copies):
        resident.setdefault((copy.layer, copy.expert), []).append(slot)
    with progress("finding the nearest copies", len(resident)) as advance:
        for place, slots in resident.items():
            own = _own_ids(draft, len(draft.tenants) - 1, place)
            same = [slot for slot in slots if _slot_ids(old, slot) == own]
            if same:
                serving[place] = same[0]
            else:
                found = np.zeros(len(slots))
                copies = [old.slot_refs(slot) for slot in slots]
                for projection, ref in draft.copy_refs(draft.tenants[-1], *place).items():
                    mine = draft.objects.read(ref)
                    for i, refs in enumerate(copies):
                        found[i] += compare([mine, old.objects.read(refs[projection])], [(0, 1)])[
                            0
                        ][0]
                serving[place] = slots[int(found.argmin())]
                squared[place] = found.min()
            advance()
    return serving, squared


def _adapted(
    old: Store, draft: Store, serving: np.ndarray, kinds: Kinds, extra_bytes: int
) -> list[AdaptedExpert]:
    """Experts of the last tenant of `draft` that an adapter made of the copies that serve them;
    none if they take more than `extra_bytes` together."""
    found = [
        a
        for a in draft.manifest.tenants[-1].adapted
        if (slot := int(serving[a.layer, a.expert])) != MISS
        and dict(a.base) == _slot_ids(old, slot)
        and all(part.bits in kinds.bits for part in a.parts)
    ]
    shapes = dict(old.experts.projections)
    return found if sum(a.residual(0).nbytes(shapes) for a in found) <= extra_bytes else []


def _residuals(
    old: Store,
    draft: Store,
    serving: np.ndarray,
    squared: np.ndarray,
    kinds: Kinds,
    extra_bytes: int,
    progress: Progress,
) -> Iterator[tuple[Residual, np.ndarray, float]]:
    """Residuals of the last tenant of `draft` with their records, and the squared distance that
    each leaves.

    As the planner's without calibration: every weight counts the same, and bytes go where one gains
    most.
    """
    places: list[Place] = [(int(layer), int(expert)) for layer, expert in np.argwhere(squared > 0)]
    if not places or not kinds.any or extra_bytes <= 0:
        return
    itemsize = BY_NAME[old.dtype].itemsize
    spectra: list[list[Spectrum]] = []
    with progress("measuring residuals", len(places)) as advance:
        for place in places:
            differences = _differences(old, draft, int(serving[place]), place)
            spectra.append(
                [spectrum(difference, plain(difference.shape)) for _, difference in differences]
            )
            advance()
    totals = [sum(s.total for s in row) for row in spectra]
    # One configuration a position, the copy that is resident, whose bytes are paid for; one tenant.
    configs = [[Config(np.ones(1), np.array([total]))] for total in totals]
    drawn = [[curve] for curve in curves(spectra, kinds, itemsize)]
    price = Allocator(configs, [drawn], np.ones(1), 0).allocate(extra_bytes).price[:, 0]
    with progress("making residuals", len(places)) as advance:
        for place, row, total, at in zip(places, spectra, totals, price, strict=True):
            if np.isfinite(at):
                choices = choose(
                    [s.scaled(s.total / total) for s in row], float(at), kinds, itemsize
                )
                parts: list[Part] = []
                packed: list[np.ndarray] = []
                left = 0.0
                differences = _differences(old, draft, int(serving[place]), place)
                for (projection, difference), choice in zip(differences, choices, strict=True):
                    rest = difference
                    if choice != Choice():
                        made = fit(difference, plain(difference.shape), projection, choice)
                        parts += made.parts
                        packed += made.packed
                        rest = difference - made.added
                    left += float((rest**2).sum())
                if parts and left < total:  # the spectrum is a prediction; what is kept must help
                    yield (
                        Residual(len(draft.tenants) - 1, *place, tuple(parts)),
                        join_parts(packed),
                        left,
                    )
            advance()


def _differences(
    old: Store, draft: Store, slot: int, place: Place
) -> Iterator[tuple[str, np.ndarray]]:
    """What the last tenant of `draft` lacks beside a copy: (projection, float64 [out, in]), one at
    a time."""
    copy = old.slot_refs(slot)
    for projection, ref in draft.copy_refs(draft.tenants[-1], *place).items():
        own = to_float32(draft.objects.read(ref)).astype(np.float64)
        yield projection, own - to_float32(old.objects.read(copy[projection]))


def _own_ids(store: Store, tenant: int, place: Place) -> dict[str, str]:
    """The objects of a tenant's own expert: projection -> id."""
    found, family = store.manifest.tenants[tenant], store.family
    return {
        projection: found.tensors[family.expert_tensor(found.config, *place, projection)]
        for projection, _ in store.experts.projections
    }


def _slot_ids(store: Store, slot: int) -> dict[str, str]:
    """The objects of a resident copy: projection -> id."""
    copy = store.plan.copies[slot]
    if copy.owner == MERGED:
        return dict(store.manifest.merged[slot])
    return _own_ids(store, copy.owner, (copy.layer, copy.expert))


def _shifted(tenant: int, gone: int) -> int:
    """A tenant's number when an earlier one has gone."""
    return tenant - (tenant > gone)


def _without_tenant(store: Store, copy: Copy, gone: int) -> Copy:
    """A copy, whose weights stay, as it is called when tenant number `gone` is no more."""
    if copy.owner == MERGED:
        # A mixture that the tenant is part of is no mixture of the others.
        known = bool(copy.mix) and copy.mix[gone] == 0
        return replace(copy, mix=copy.mix[:gone] + copy.mix[gone + 1 :] if known else ())
    if copy.owner != gone:
        return replace(copy, owner=_shifted(copy.owner, gone))
    place = copy.layer, copy.expert
    own = _own_ids(store, gone, place)
    for tenant in range(len(store.tenants)):
        if tenant != gone and _own_ids(store, tenant, place) == own:
            return replace(copy, owner=_shifted(tenant, gone))
    return Copy(*place, MERGED)


def _provenance(old: Store, draft: Store, added: list[str], removed: list[str]) -> dict[str, Any]:
    found = {key: value for key, value in old.manifest.provenance.items() if key != BESIDE}
    # Traffic of a tenant that is no more would be refused by the next plan.
    traffic = {
        name: share
        for name, share in found["settings"].get("traffic", {}).items()
        if name in draft.tenants
    }
    found["settings"] = {**found["settings"], "traffic": traffic}
    return {**found, BESIDE: {"added": added, "removed": removed}} if added or removed else found
