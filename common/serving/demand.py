"""What tenants ask for beside what the device can give, in rows of steps: whether one tenant's
requests are a flood.

A request takes a row for each token of its answer, and what is computed of its prompt as many more
as cost the same time.

What waits does not tell. A tenant that has most of the traffic of a device that keeps up with it
may have a backlog for a while, and is best served at once; and holding a tenant to its share makes
a backlog of its own, which must not be a reason to go on. So a tenant's backlog is counted as it
were if the device had always done what it can at its best, fairly shared among those who have one
(generalized processor sharing): a flood's grows for as long as it lasts, and everything else's
comes back to nothing, whatever the scheduler did.
"""

from __future__ import annotations

from collections.abc import Callable

from common.serving.request import Request

RECENT_S = 60.0
"""Seconds for which a tenant without requests is still reckoned with."""

ANSWERS = 50
"""Answers over which is taken how many of the tokens that a tenant asks for at most it gets."""


class Demand:
    """Arrivals and lengths of answers, of all tenants. Times are the callers'.

    backlog: tenant -> rows that would wait to be computed if every step since had been a full one.
    """

    def __init__(self) -> None:
        self.backlog: dict[str, float] = {}
        self._at = 0.0
        self._last: dict[str, float] = {}
        self._used: dict[str, tuple[int, float, float]] = {}

    def passed(self, now: float, rows_per_s: float, weight: Callable[[str], float]) -> None:
        """It is `now`, and since the last time the device could do so much."""
        left = rows_per_s * max(0.0, now - self._at)
        self._at = max(self._at, now)
        # In the order in which they come to an end; each leaves to the others what it does not
        # need.
        total = sum(weight(n) for n in self.backlog)
        for name in sorted(self.backlog, key=lambda n: self.backlog[n] / weight(n)):
            done = min(self.backlog[name], left * weight(name) / total)
            self.backlog[name] -= done
            left -= done
            total -= weight(name)
        self.backlog = {n: rows for n, rows in self.backlog.items() if rows > 0}

    def arrived(self, request: Request, token_rows: float) -> None:
        """After `passed`."""
        self.backlog[request.tenant] = self.backlog.get(request.tenant, 0.0) + self.rows(
            request, token_rows
        )
        self._last[request.tenant] = request.taken_at

    def found(self, request: Request, token_rows: float) -> None:
        """What the cache holds of a request's prompt need not be computed."""
        rows = token_rows * request.num_cached_tokens
        if request.tenant in self.backlog:
            self.backlog[request.tenant] = max(0.0, self.backlog[request.tenant] - rows)

    def answered(self, request: Request) -> None:
        """Learn the length of an answer that came to its end."""
        count, got, asked = self._used.get(request.tenant, (0, 0.0, 0.0))
        count = min(count + 1, ANSWERS)
        got += (len(request.token_ids) - got) / count
        asked += (request.max_new_tokens - asked) / count
        self._used[request.tenant] = count, got, asked

    def forget(self, tenant: str) -> None:
        self._used.pop(tenant, None)
        self._last.pop(tenant, None)
        self.backlog.pop(tenant, None)

    def tenants(self, now: float) -> set[str]:
        """Those with a recent arrival."""
        return {tenant for tenant, at in self._last.items() if at > now - RECENT_S}

    def rows(self, request: Request, token_rows: float) -> float:
        """What a request takes. token_rows: rows that cost as much as a token of a prompt.

        Its answer's expected length is the part of what it asks for at most that its tenant's
        answers had so far, or all tenants', or all of it.
        """
        used = (
            [self._used[request.tenant]]
            if request.tenant in self._used
            else list(self._used.values())
        )
        part = sum(got for _, got, _ in used) / sum(asked for _, _, asked in used) if used else 1.0
        read = len(request.prompt) - request.num_cached_tokens
        return request.max_new_tokens * part + token_rows * read
