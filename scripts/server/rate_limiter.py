"""Requests a minute: a token bucket for each key or tenant."""

from __future__ import annotations

import time
from collections.abc import Callable


class RateLimiter:
    """Lets `per_minute` requests through at once, and then one every 60 / per_minute seconds; None
    lets all through."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic):
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # what is left, and when that was so

    def take(self, name: str) -> float:
        """Count one request of `name`. Returns 0 if it may pass, else the seconds until one may."""
        if self._per_minute is None:
            return 0.0
        now, rate = self._clock(), self._per_minute / 60
        left, since = self._buckets.get(name, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * rate)
        if left < 1:
            self._buckets[name] = (left, now)
            return (1 - left) / rate
        self._buckets[name] = (left - 1, now)
        return 0.0
