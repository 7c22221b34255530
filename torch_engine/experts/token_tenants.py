"""Which experts the tokens of a step are for, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenTenants:
    """The tenant of each token. ids: int64 [T] on the host; single: the tenant's index if it is one
    for all."""

    ids: np.ndarray
    single: int | None


def looked_up(table: np.ndarray, ids: np.ndarray, tenants: TokenTenants) -> np.ndarray:
    """table[tenant, expert] for each token's experts. ids: [T, K]."""
    return np.asarray(
        table[tenants.single][ids]
        if tenants.single is not None
        else table[tenants.ids[:, None], ids]
    )


def groups_of(sorted_keys: np.ndarray) -> list[tuple[int, int, int]]:
    """(key, start, stop) of each run of equal keys."""
    starts = [0, *(np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1).tolist()]
    stops = [*starts[1:], len(sorted_keys)]
    return [
        (key, a, b) for key, a, b in zip(sorted_keys[starts].tolist(), starts, stops, strict=True)
    ]
