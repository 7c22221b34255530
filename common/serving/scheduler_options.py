"""How requests share the steps of an engine."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from common.bounds import COUNT, COUNT_OR_NONE, Bound, bounded, check_bounds
from common.errors import EngineError, UnknownTenantError

WEIGHT = Bound(above=0, high=sys.float_info.max)


@dataclass(frozen=True)
class SchedulerOptions:
    """How requests share the steps of an engine.

    Attributes:
        max_num_seqs: requests that advance in a step.
        max_num_batched_tokens: tokens of a step.
        prefill_chunk: tokens of prompts in a step in which others answer; None: the backend's
            `default_chunk`.
        max_model_len: bound of prompt and answer together; None: the tenant's context and the room
            in the caches.
        max_queue: requests that may wait for their first step.
        max_queue_per_tenant: the same of one tenant; None: no bound of its own.
        weights: tenant -> its share beside the others' (1 where none is given).
        limits: tenant -> most places it takes in a step, however many are free.
        default_limit: the same of tenants without one; None: as many as are free.
        max_interference: how much longer (0.1: a tenth) tenants that ask for more than the device
            can give them may make a step for the others, where their shares of the throughput do
            not take more; inf: they may take every place that others leave free.
        switch_share: most of the time that reconfigurations may take, if the device cannot hold all
            tenants that have requests.

    Raises:
        EngineError: a value is out of range.
    """

    max_num_seqs: int = bounded(32, COUNT)
    max_num_batched_tokens: int = bounded(2048, COUNT)
    prefill_chunk: int | None = bounded(None, COUNT_OR_NONE)
    max_model_len: int | None = bounded(None, COUNT_OR_NONE)
    max_queue: int = bounded(1024, COUNT)
    max_queue_per_tenant: int | None = bounded(None, COUNT_OR_NONE)
    weights: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    default_limit: int | None = bounded(None, COUNT_OR_NONE)
    max_interference: float = bounded(0.1, Bound(low=0, note=", or inf"))
    switch_share: float = bounded(0.1, Bound(above=0, high=1))

    def __post_init__(self) -> None:
        check_bounds(self, EngineError)
        for tenant, weight in self.weights.items():
            if not WEIGHT.allows(weight):
                raise EngineError(f"the weight of tenant {tenant!r} is {weight!r}; {WEIGHT.words}")
        for tenant, limit in self.limits.items():
            if not COUNT.allows(limit):
                raise EngineError(f"the limit of tenant {tenant!r} is {limit!r}; {COUNT.words}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise EngineError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, fewer than max_num_seqs "
                f"({self.max_num_seqs}); give each sequence of a step at least one token"
            )

    def check_tenants(self, tenants: Collection[str]) -> None:
        """Raises UnknownTenantError if a weight or limit names a tenant that is not there."""
        for name in [*self.weights, *self.limits]:
            if name not in tenants:
                raise UnknownTenantError(name, tuple(tenants))

    def weight(self, tenant: str) -> float:
        return self.weights.get(tenant, 1.0)

    def limit(self, tenant: str) -> int:
        """Most places of a step that a tenant takes."""
        return min(
            self.max_num_seqs, self.limits.get(tenant, self.default_limit or self.max_num_seqs)
        )
