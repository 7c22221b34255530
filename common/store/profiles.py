"""The calibration profiles that a store keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from common.families import ExpertSpec
from common.plan.profile import TABLES, Profile
from common.store.store import Store


def load_profile(store: Store, tenant: str) -> Profile | None:
    """The profile that a store keeps of a tenant, None if it has none.

    Raises StoreError where it is damaged.
    """
    value = store.manifest.calibration.get(tenant)
    if value is None:
        return None

    def mapped(object_id: str) -> np.ndarray:
        ref = store.objects.ref(object_id)
        array = ref.map()
        store.objects.check(ref, array)
        return array

    return profile_of(value, store.experts, mapped)


def profile_of(
    value: Mapping[str, Any], spec: ExpertSpec, find: Callable[[str], np.ndarray]
) -> Profile:
    """What `Profile.to_json` made. find: what an array was put as -> the array, best mapped: a
    large model's inputs take a gigabyte a tenant."""
    arrays = {
        "inputs": np.zeros((0, spec.hidden_size), np.float32),
        "gates": np.zeros(0, np.float32),
    }
    arrays |= {name: find(kept) for name, kept in value["objects"].items()}
    tables = {name: np.array(value[name], dtype=kind) for name, kind in TABLES.items()}
    return Profile(**tables, **arrays)
