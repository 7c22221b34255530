"""What tenants' requests came to since an engine was loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.serving.backend import Step
from common.serving.request import Request

FINISHED = ("stop", "length", "abort", "deadline", "error")
COUNTED = (
    "prompt_tokens",
    "generation_tokens",
    "read_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "hits",
    "misses",
    "preemptions",
    "flood_steps",
    "reconfigurations",
)


def running(requests: Sequence[Request]) -> dict[str, int]:
    """How many of these have caches, and how many wait for them."""
    count = sum(r.sequence is not None for r in requests)
    return {"running": count, "waiting": len(requests) - count}


class Statistics:
    """Counts by tenant."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def of(self, tenant: str) -> Counter[str]:
        return self._counts.setdefault(tenant, Counter())

    def count_step(self, step: Step, flooding: set[str] | frozenset[str]) -> None:
        """Reconfigurations of a step, and who floods."""
        for name in flooding:
            self.of(name)["flood_steps"] += 1
        for name, seconds in step.reconfiguration_s.items():
            self.of(name)["reconfigurations"] += 1
            self.of(name)["reconfiguration_us"] += round(seconds * 1e6)

    def count_end(self, request: Request, reason: str) -> None:
        counts = self.of(request.tenant)
        counts[f"finished_{reason}"] += 1
        counts["preemptions"] += request.preemptions

    def summary(self, tenant: str) -> dict[str, Any]:
        """For `Engine.stats`; `reconfiguration_s` in seconds."""
        counts = self.of(tenant)
        return {
            "requests": {reason: counts[f"finished_{reason}"] for reason in FINISHED},
            **{name: counts[name] for name in COUNTED},
            "reconfiguration_s": counts["reconfiguration_us"] / 1e6,
        }
