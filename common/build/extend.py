"""Add a tenant to a store that goes on serving the others as it does: copies, slots and their
answers stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.build.beside import came_and_went, join
from common.build.build import change_beside
from common.build.settings import PlanSettings, check_extra
from common.build.sources import with_tenant
from common.errors import PlanError
from common.planning.policies import DEFAULT_EXTRA, policy_named
from common.planning.residual_curves import Kinds
from common.progress import Progress, silent
from common.store.manifest import Manifest
from common.store.store import Store
from common.units import format_bytes


def extend_store(
    path: str | Path,
    name: str,
    checkpoint: str | Path,
    *,
    config: str | Path | None = None,
    base: str | Path | None = None,
    extra: float | None = None,
    progress: Progress = silent,
) -> Store:
    """Add a tenant beside the plan; what other tenants are served stays bit for bit.

    The tenant is served by the resident copy nearest to its own expert, and misses where there is
    none. A later `replan`, `add_tenant` or `remove_tenant` plans anew for all.

    Args:
        config: config.json of a T5X or Orbax checkpoint, which holds none.
        base: of a PEFT adapter; else the one that the adapter names.
        extra: bytes for residuals of its own, as a share of one model's expert bytes. Without it
            what each planned tenant had: `DEFAULT_EXTRA` or its part of the store's own share, or
            what an adapter's own numbers take if that is more; no more than is left of a budget;
            nothing where the policy has no use for it or slots were given.

    Raises CheckpointError, PlanError or StoreError; the store is then as it was.
    """
    if extra is not None:
        check_extra(extra)

    def beside(old: Store, draft: Store, put: Callable[[np.ndarray], str]) -> Manifest:
        settings = PlanSettings.from_json(old.manifest.provenance["settings"])
        kinds = policy_named(settings.policy).kinds
        manifest = join(
            old,
            draft,
            kinds if kinds.any else Kinds(),
            _bytes_beside(settings, old, draft, extra),
            put,
            progress,
        )
        found = Store(draft.path, manifest)
        # A store that was over its budget before may stay as much over it.
        if settings.budget_bytes is not None and found.bytes_budget > max(
            settings.budget_bytes, old.bytes_budget
        ):
            raise PlanError(
                f"with tenant {name!r} the store takes {format_bytes(found.bytes_budget)}, more "
                "than the budget of "
                f"{format_bytes(settings.budget_bytes)} that it was planned with; give a smaller "
                "share of extra bytes, "
                "or plan it anew with a larger budget"
            )
        return manifest

    return change_beside(Path(path), with_tenant(name, checkpoint, config, base), beside, progress)


def _bytes_beside(settings: PlanSettings, old: Store, draft: Store, extra: float | None) -> int:
    """Bytes for the residuals of the last tenant of `draft`, see `extend_store`."""
    one_model = old.experts.num_positions * old.copy_bytes
    if extra is not None:
        return int(extra * one_model)
    if settings.slots is not None or not policy_named(settings.policy).uses_extra:
        return 0
    # What an adapter adds is held as it is.
    shapes = dict(old.experts.projections)
    adapter = sum(a.residual(0).nbytes(shapes) for a in draft.manifest.tenants[-1].adapted)
    if settings.extra is not None:
        added, removed = came_and_went(old)
        planned = len(old.tenants) - len(added) + len(removed)
        return max(adapter, int(settings.extra / planned * one_model))
    found = max(adapter, int(DEFAULT_EXTRA * one_model))
    if settings.budget_bytes is not None:
        fixed = max(draft.non_expert_bytes(name) for name in draft.tenants)
        room = (
            settings.budget_bytes - fixed - old.plan.num_slots * old.copy_bytes - old.residual_bytes
        )
        return max(0, min(found, room))
    return found
