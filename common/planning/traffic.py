"""How tenants share the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.errors import PlanError


def shares_of_traffic(tenants: Sequence[str], given: Mapping[str, float]) -> np.ndarray:
    """float64 [tenants], summing to 1. Tenants that are not named count as 1. Raises PlanError."""
    strangers = sorted(set(given) - set(tenants))
    if strangers:
        raise PlanError(f"traffic is given for {strangers[0]!r}, which is no tenant of this store")
    for name, value in given.items():
        if isinstance(value, bool) or not (
            isinstance(value, int | float) and np.isfinite(value) and value > 0
        ):
            raise PlanError(f"traffic of {name!r} is {value!r}; give a number above 0")
    shares = np.array([float(given.get(name, 1.0)) for name in tenants])
    return np.asarray(shares / shares.sum())
