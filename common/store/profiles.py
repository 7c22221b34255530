"""The calibration profiles that a store keeps."""

from __future__ import annotations

import numpy as np

from common.plan.profile import TABLES, Profile
from common.store.store import Store


def load_profile(store: Store, tenant: str) -> Profile | None:
    """The profile that a store keeps of a tenant, None if it has none.

    Raises StoreError where it is damaged.
    """
    value = store.manifest.calibration.get(tenant)
    if value is None:
        return None
    hidden = store.experts.hidden_size
    arrays = {"inputs": np.zeros((0, hidden), np.float32), "gates": np.zeros(0, np.float32)}
    for name, object_id in value["objects"].items():
        ref = store.objects.ref(object_id)
        arrays[name] = ref.map()  # not read: large models' inputs take a gigabyte a tenant
        store.objects.check(ref, arrays[name])
    tables = {name: np.array(value[name], dtype=kind) for name, kind in TABLES.items()}
    return Profile(**tables, **arrays)
