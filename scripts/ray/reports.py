"""What all replicas say of themselves, taken together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from scripts.server.metrics import PREFIX

KEPT_S = 0.5
"""How long what was asked is not asked again."""
TIMEOUT_S = 3.0
"""A replica that takes longer is left out."""


def together(parts: Sequence[Any]) -> Any:
    """Numbers are summed, lists joined without doubles, dicts by key; of others the first stays."""
    first = parts[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: together([part[key] for part in parts if key in part]) for key in keys}
    if isinstance(first, list):
        return list(dict.fromkeys(each for part in parts for each in part))
    if isinstance(first, int | float) and not isinstance(first, bool):
        return sum(parts)
    return first


class Reports:
    """The replicas' `EngineReplica.report`s, asked for when somebody wants them."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._lock = asyncio.Lock()
        self._found: list[dict[str, Any]] = []
        self._asked_at = -KEPT_S

    async def all(self) -> list[dict[str, Any]]:
        """Of the replicas that answer in time."""
        async with self._lock:
            if time.monotonic() - self._asked_at >= KEPT_S:
                self._found = await self._ask()
                self._asked_at = time.monotonic()
        return self._found

    async def _ask(self) -> list[dict[str, Any]]:
        try:
            answers = self._handle.broadcast("report")
            found = await answers.results_async(timeout_s=TIMEOUT_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):  # there is no replica, or a slow one
            return []
        return [f for f in found if isinstance(f, dict)]

    @property
    def last(self) -> list[dict[str, Any]]:
        return self._found


class ReplicaMetrics(Collector):
    """What the ingress counts of its replicas, beside what the replicas' engines count."""

    def __init__(self, reports: Reports, losses: Any):
        """losses: called for how many answers a replica was lost under."""
        self._reports, self._losses = reports, losses

    def describe(self) -> list[Metric]:
        return []  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        reports = self._reports.last
        yield GaugeMetricFamily(PREFIX + "replicas", "Replicas that answer.", len(reports))
        yield CounterMetricFamily(
            PREFIX + "replica_losses", "Answers that a replica was lost under.", self._losses()
        )
        routed = CounterMetricFamily(
            PREFIX + "routed_requests",
            "Requests that came to a replica; warm: whether the tenant was ready there.",
            labels=["model_name", "warm"],
        )
        counts = together([{}, *(r["routed"] for r in reports)])
        for tenant, numbers in counts.items():
            for warm, number in numbers.items():
                routed.add_metric([tenant, warm], number)
        yield routed
