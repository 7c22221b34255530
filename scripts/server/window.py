"""What the status page shows of the last minute: a bucket a second for each tenant."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

SECONDS = 60
RATE_SECONDS = 10
"""Tokens a second are a mean over so many."""
SAMPLES = 256
"""Most latencies that a bucket keeps; beyond, each of them has the same chance to be among those
kept."""


@dataclass
class _Sample:
    """A bounded random sample of what was added."""

    values: list[float] = field(default_factory=list)
    seen: int = 0

    def add(self, value: float) -> None:
        self.seen += 1
        if len(self.values) < SAMPLES:
            self.values.append(value)
        elif (at := random.randrange(self.seen)) < SAMPLES:
            self.values[at] = value


@dataclass
class _Bucket:
    second: int
    tokens: int = 0
    first: _Sample = field(default_factory=_Sample)
    gaps: int = 0
    gap_s: float = 0.0


def quantile(values: Collection[float], share: float) -> float | None:
    """The value that so large a share of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


class Window:
    """Tokens and latencies of the last `SECONDS` seconds, by tenant."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[str, dict[int, _Bucket]] = {}

    def add(
        self, tenant: str, tokens: int, *, first_s: float | None = None, gap_s: float | None = None
    ) -> None:
        """Count new tokens; first_s: time to the first token, if these hold it; gap_s: time since
        the last ones."""
        second = int(self._clock())
        buckets = self._buckets.setdefault(tenant, {})
        bucket = buckets.get(second)
        if bucket is None:
            bucket = buckets[second] = _Bucket(second)
            for old in [s for s in buckets if s < second - SECONDS]:
                del buckets[old]
        bucket.tokens += tokens
        if first_s is not None:
            bucket.first.add(first_s)
        if gap_s is not None:
            bucket.gaps += 1
            bucket.gap_s += gap_s

    def _recent(self, tenant: str, now: int) -> list[_Bucket]:
        return [b for s, b in self._buckets.get(tenant, {}).items() if s >= now - SECONDS]

    def tenant(self, name: str) -> dict[str, float | None]:
        """tokens_per_second, and the quantiles of the time to the first token in milliseconds."""
        now = int(self._clock())
        recent = self._recent(name, now)
        first = [v for b in recent for v in b.first.values]
        # The current second is not over and would make the rate too low.
        tokens = sum(b.tokens for b in recent if now - RATE_SECONDS <= b.second < now)
        return {
            "tokens_per_second": tokens / RATE_SECONDS,
            "ttft_p50_ms": _ms(quantile(first, 0.5)),
            "ttft_p95_ms": _ms(quantile(first, 0.95)),
        }

    def series(self, names: Iterable[str]) -> dict[str, list[Any]]:
        """A value for each second, oldest first, over these tenants; null where nothing came."""
        now = int(self._clock())
        by_second: dict[int, list[_Bucket]] = {}
        for name in names:
            for bucket in self._recent(name, now):
                by_second.setdefault(bucket.second, []).append(bucket)
        tokens, first, gaps = [], [], []
        for second in range(now - SECONDS, now):
            here = by_second.get(second, [])
            tokens.append(sum(b.tokens for b in here))
            first.append(_ms(quantile([v for b in here for v in b.first.values], 0.5)))
            # A mean: tokens of two steps may arrive together when the machine is busy, and half of
            # the gaps are then 0.
            count = sum(b.gaps for b in here)
            gaps.append(_ms(sum(b.gap_s for b in here) / count if count else None))
        return {"tokens": tokens, "ttft_p50_ms": first, "itl_mean_ms": gaps}

    def forget(self, tenant: str) -> None:
        self._buckets.pop(tenant, None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
