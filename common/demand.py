"""What tenants lately asked for, in rows of steps a second: whether the device can give them all that, or one tenant's
requests are a flood.

A request takes a row for each token of its answer, and its prompt as many more as cost the same time.

A backlog alone does not tell. A tenant that has most of the traffic of a device that keeps up with it may have one for
a while, and is best served at once; a flood's grows whatever it is given.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

from common.request import Request

RECENT = 64
"""Arrivals of which the rate is taken: its standard deviation is an eighth for Poisson arrivals, and a flood is seen
before it has brought so many."""

FEWEST = RECENT // 2
"""Below so many arrivals there is no rate."""

ANSWERS = 50
"""Answers over which is taken how many of the tokens that a tenant asks for at most it gets."""


class Demand:
    """Arrivals and lengths of answers, of all tenants. Times are the callers'."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, str, int, int]] = deque(maxlen=RECENT)
        self._used: dict[str, tuple[int, float, float]] = {}

    def arrived(self, request: Request) -> None:
        self._arrivals.append((request.taken_at, request.tenant, len(request.prompt), request.max_new_tokens))

    def answered(self, request: Request) -> None:
        """Learn the length of an answer that came to its end."""
        count, got, asked = self._used.get(request.tenant, (0, 0.0, 0.0))
        count = min(count + 1, ANSWERS)
        got += (len(request.token_ids) - got) / count
        asked += (request.max_new_tokens - asked) / count
        self._used[request.tenant] = count, got, asked

    def forget(self, tenant: str) -> None:
        self._used.pop(tenant, None)
        self._arrivals = deque((a for a in self._arrivals if a[1] != tenant), maxlen=RECENT)

    @property
    def tenants(self) -> Collection[str]:
        """Those with a recent arrival."""
        return {tenant for _, tenant, _, _ in self._arrivals}

    def rows(self, request: Request, token_rows: float) -> float:
        """What a request takes. token_rows: rows that cost as much as a token of a prompt.

        Its answer's expected length is the part of what it asks for at most that its tenant's answers had so far, or
        all tenants', or all of it.
        """
        return request.max_new_tokens * self._part(request.tenant) + token_rows * len(request.prompt)

    def _part(self, tenant: str) -> float:
        used = [self._used[tenant]] if tenant in self._used else list(self._used.values())
        return sum(got for _, got, _ in used) / sum(asked for _, _, asked in used) if used else 1.0

    def rows_per_s(self, now: float, window_s: float, token_rows: float) -> float:
        """What recent requests take, over the time in which they came.

        window_s: what came earlier is not recent. 0 if too few did to tell; infinite if all came just now.
        """
        while self._arrivals and self._arrivals[0][0] < now - window_s:
            self._arrivals.popleft()
        if len(self._arrivals) < FEWEST:
            return 0.0
        time_s = now - self._arrivals[0][0]
        parts = {tenant: self._part(tenant) for tenant in self.tenants}
        rows = sum(most * parts[tenant] + token_rows * read for _, tenant, read, most in self._arrivals)
        return rows / time_s if time_s > 0 else math.inf
