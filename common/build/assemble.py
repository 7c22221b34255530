"""From sources to a store's manifest: every tensor put away, tenants calibrated, a plan made."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

import numpy as np

from common.build.draft import make_draft
from common.build.examples import CalibrationSet
from common.build.settings import Amount, PlanSettings
from common.build.sources import Source
from common.build.unfinished import Unfinished
from common.errors import PlanError
from common.plan.distance import Distances
from common.plan.profile import Profile
from common.planning.adapters import plan_adapters
from common.planning.measurements import Measurements
from common.planning.planner import Planner
from common.progress import Progress
from common.store.change import put, with_plan
from common.store.manifest import NONE, Manifest
from common.store.objects import Objects
from common.store.pack import for_serving
from common.store.store import Store
from common.version import __version__


def assemble(
    objects: Objects,
    sources: Sequence[Source],
    settings: PlanSettings,
    amount: Amount,
    dtype: str,
    own_experts: str,
    old: Distances | None,
    profiles: Mapping[str, Profile],
    calibration: Mapping[str, CalibrationSet | Profile],
    progress: Progress,
    known: Measurements | None = None,
) -> Manifest:
    """Put every tensor of every source among `objects`, plan, and describe it all.

    known: what planning measured before, used as far as it still holds.
    """
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.to_json(),
        "versions": {
            "moetel": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "safetensors": version("safetensors"),
        },
    }
    directory = objects.root.parent
    draft = make_draft(directory, sources, dtype, old, provenance, progress, objects, own_experts)
    measured = {name: given for name, given in calibration.items() if isinstance(given, Profile)}
    for name, profile in measured.items():
        profile.check(sources[0].config.experts, name)
    asked = {name: given for name, given in calibration.items() if not isinstance(given, Profile)}
    unfinished = Unfinished(directory)
    profiles = {**profiles, **measured, **unfinished.calibrate(draft, asked, progress)}
    kept = {name: profile.to_json(objects.put) for name, profile in profiles.items()}
    draft = Store(directory, replace(draft.manifest, calibration=kept), objects)
    if amount.slots is None:
        return _dropped(draft.manifest, objects)
    if settings.slots is None and amount.slots == draft.experts.num_positions:
        limited = settings.budget_bytes is not None or settings.extra is not None
        exact = plan_adapters(settings.policy, draft, amount.extra_bytes if limited else None)
        if exact is not None:
            return _dropped(exact.of(draft), objects)
    planner = Planner(draft, profiles, settings.traffic, progress, known, unfinished.measurements)
    keep = partial(put, draft)
    outcome = planner.plan(settings.policy, amount.slots, amount.extra_bytes, keep)
    if planner.measurements.worth_keeping:
        found = planner.measurements.to_json(objects.put)
        draft = Store(directory, replace(draft.manifest, measurements=found), objects)
    manifest = with_plan(
        draft, outcome.plan, outcome.merged, outcome.records, outcome.prediction.to_json()
    )
    return _dropped(manifest, objects)


def _dropped(manifest: Manifest, objects: Objects) -> Manifest:
    """The manifest without own experts, if they are not to be kept."""
    if manifest.own_experts != NONE:
        return manifest
    if manifest.plan.num_misses:
        raise PlanError(
            f"{manifest.plan.num_misses} experts of tenants would be missed, and --own-experts "
            "none keeps none of them; give every position a copy, or use copy or reference"
        )
    found = for_serving(manifest)
    for object_id in found.object_ids():
        if not objects.entry(object_id).in_store:
            objects.move(object_id)
    return found
