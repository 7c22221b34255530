"""Stores of a partition: the same files in half of the memory."""

from __future__ import annotations

from collections.abc import Sequence

from common import EngineError, Store
from common.plan.distance import tenant_pairs
from common.planning.round_robin import plan_round_robin
from scripts.store_views import only

NUM_PARTITIONS = 2

SPARE_SLOTS = 2
"""Copies that a partition has room for beside those that stay: what one token of a Mixtral picks in
a layer. They count as its memory."""


def half_budget(store: Store) -> int:
    """Bytes of one of the partitions: half of one model's experts and one tenant's non-expert
    weights."""
    most = max(store.non_expert_bytes(name) for name in store.tenants)
    return (store.experts.num_positions * store.copy_bytes + most) // NUM_PARTITIONS


def within(store: Store, names: Sequence[str], budget_bytes: int) -> Store:
    """These tenants in so much memory, by the paper's rule: as many positions as fit have a copy,
    others miss.

    Raises EngineError if not even one tenant's non-expert weights and the spare slots fit.
    """
    most = max(store.non_expert_bytes(name) for name in names)
    room = budget_bytes - most - SPARE_SLOTS * store.copy_bytes
    if room < 0:
        raise EngineError(
            f"half of the memory ({budget_bytes} bytes) does not hold one tenant's non-expert "
            f"weights ({most} bytes) "
            f"and {SPARE_SLOTS} experts of {store.copy_bytes} bytes; leave the system 'partition' "
            "out"
        )
    places = [store.tenants.index(name) for name in names]
    wanted = [
        i for i, pair in enumerate(tenant_pairs(len(store.tenants))) if set(pair) <= set(places)
    ]
    score = store.distances.matrix[wanted].sum(axis=0)
    slots = min(room // store.copy_bytes, store.experts.num_positions)
    return only(store, names, plan_round_robin(score, names, slots))
