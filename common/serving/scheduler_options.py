"""How requests share the steps of an engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from common.errors import EngineError, UnknownTenantError
from common.units import is_whole


@dataclass(frozen=True)
class SchedulerOptions:
    """max_num_seqs: requests that advance in a step. max_num_batched_tokens: tokens of a step.
    prefill_chunk: tokens of prompts in a step in which others answer; None: the backend's
        `default_chunk`.
    max_model_len: bound of prompt and answer together; None: the tenant's context and the room in
        the caches.
    max_queue, max_queue_per_tenant: requests that may wait for their first step; None: no bound of
        its own.
    weights: tenant -> its share beside the others' (1 where none is given).
    limits: tenant -> most places it takes in a step, however many are free; `default_limit`: of the
        others.
    max_interference: how much longer (0.1: a tenth) tenants that ask for more than the device can
        give them may make a step for the others, where their shares of the throughput do not take
        more; inf: they may take every place that others leave free.
    switch_share: most of the time that reconfigurations may take, if the device cannot hold all
        tenants that have requests.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    prefill_chunk: int | None = None
    max_model_len: int | None = None
    max_queue: int = 1024
    max_queue_per_tenant: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    default_limit: int | None = None
    max_interference: float = 0.1
    switch_share: float = 0.1

    def __post_init__(self) -> None:
        """Raises EngineError for a value out of range."""
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_chunk",
            "max_model_len",
            "max_queue",
            "max_queue_per_tenant",
            "default_limit",
        ):
            value = getattr(self, name)
            if value is None and name not in (
                "max_num_seqs",
                "max_num_batched_tokens",
                "max_queue",
            ):
                continue
            if not is_whole(value) or value < 1:
                raise EngineError(f"{name} is {value!r}; give a whole number from 1")
        for tenant, weight in self.weights.items():
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or not 0 < weight < math.inf
            ):
                raise EngineError(
                    f"the weight of tenant {tenant!r} is {weight!r}; give a number above 0"
                )
        for tenant, limit in self.limits.items():
            if not is_whole(limit) or limit < 1:
                raise EngineError(
                    f"the limit of tenant {tenant!r} is {limit!r}; give a whole number from 1"
                )
        if isinstance(self.max_interference, bool) or not self.max_interference >= 0:
            raise EngineError(
                f"max_interference is {self.max_interference!r}; give a number from 0, or inf"
            )
        if not 0 < self.switch_share <= 1:
            raise EngineError(
                f"switch_share is {self.switch_share!r}; give a number above 0, at most 1"
            )
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
