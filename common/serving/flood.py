"""Tenants that flood the device, and how much they may slow the others down.

A tenant floods the device if it asks for more than the device could give it at its best. Then no
number of places would do, and each makes the others' next tokens later. It gets what gives it its
share of the tokens a second that the device gives at its best, or what makes a step
`max_interference` longer, whichever is more. It comes with more rows in fewer steps where what it
has of its own makes a step longer than a row does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from common.serving.backend import Backend, Part
from common.serving.demand import Demand
from common.serving.places import first_of
from common.serving.request import Request
from common.serving.scheduler_options import SchedulerOptions
from common.serving.step_times import StepTimes

BURST, FEW = 0.25, 4
"""A backlog of fewer requests than so many times those of a full step is no flood, nor one of a
few."""


VARIED = 0.05
"""Standard deviation of lately taken steps' rows, beside those of a full step, that tells what a
row costs."""


NEWEST = 32
"""Requests of a tenant from which its others' lengths are taken."""


SMALLEST_PIECE = 16
"""Tokens of a prompt that a flooding tenant may read in a step at least."""


@dataclass
class Allowance:
    """Who floods the device, and the seconds by which they may make steps longer.

    allowance_s: of this step. balance_s: what is left of it and of earlier ones; below 0 after a
    long piece of a prompt.
    """

    tenants: frozenset[str] = frozenset()
    allowance_s: float = 0.0
    balance_s: float = 0.0


class Floods:
    """Measures what steps cost and what tenants ask for, and holds those who flood the device.

    requests: gives a tenant's unfinished requests.
    """

    def __init__(
        self,
        backend: Backend,
        options: SchedulerOptions,
        requests: Callable[[str], list[Request]],
    ):
        self._backend, self._options, self._requests = backend, options, requests
        self.times = StepTimes()
        self.demand = Demand()
        self._allowance = Allowance()
        self._best_known = False

    @property
    def tenants(self) -> frozenset[str]:
        """Those that flooded the device in the last step and were held to their shares of it."""
        return self._allowance.tenants

    def arrived(self, request: Request) -> None:
        """Count what a new request asks for."""
        at = request.taken_at
        self.demand.passed(at, self.best_rows_per_s(at), self._options.weight)
        self.demand.arrived(request, self.token_rows)

    def began(self, request: Request) -> None:
        """Count what it found in the cache no more."""
        self.demand.found(request, self.token_rows)

    def passed(self, now: float, active: Sequence[str]) -> None:
        """Let the time up to a step pass. active: tenants with requests."""
        best = self.best_rows_per_s(now)
        self.demand.passed(now, best, self._options.weight)
        if best and not self._best_known:
            # What came before is still there as far as the device had not places enough for it.
            self._best_known = True
            places = self._options.max_num_seqs // len(active)
            self.demand.backlog = {
                n: self._mean_rows(n) * max(0, self._count(n) - places) for n in active
            }

    def end(self) -> None:
        """Nobody floods the device in this step."""
        self._allowance = Allowance()

    def flooding(self, wanted: Mapping[str, int], shares: Mapping[str, float]) -> frozenset[str]:
        """Tenants that want more places than their shares and would have a backlog whatever the
        device did, if others do not."""
        most, found = self._options.max_num_seqs, set()
        if self._options.max_interference == math.inf:
            return frozenset()
        for name, count in wanted.items():
            if count > most * shares[name]:
                mean = self._mean_rows(name)
                # What nobody waits for any more is no demand.
                backlog = min(self.demand.backlog.get(name, 0.0), mean * self._count(name))
                self.demand.backlog[name] = backlog
                if backlog > max(FEW, BURST * most) * mean:
                    found.add(name)
        return frozenset(found) if len(found) < len(wanted) else frozenset()

    def _count(self, name: str) -> int:
        return len(self._requests(name))

    def _mean_rows(self, name: str) -> float:
        """What each of a tenant's requests takes."""
        return fmean(self.demand.rows(r, self.token_rows) for r in self._requests(name)[-NEWEST:])

    @property
    def chunk(self) -> int:
        """Most tokens of prompts in a step in which others answer."""
        return self._options.prefill_chunk or self._backend.default_chunk

    @property
    def token_rows(self) -> float:
        """Rows that make a step as much longer as a token of a prompt does."""
        return self.times.token_s / self.times.row_s if self.times.row_s else 0.0

    def best_rows_per_s(self, now: float) -> float:
        """What full steps of all who lately asked for something do, with as many tokens of prompts
        for each row as lately; 0 if that is not known."""
        most = self._options.max_num_seqs
        read = min(float(self.chunk), most * self.times.read_per_row)
        tenants = min(len(self.demand.tenants(now)), self._backend.max_ready_tenants)
        seconds = self.times.seconds(tenants, most, read)
        return (most + self.token_rows * read) / seconds if seconds else 0.0

    def places(
        self, flooding: frozenset[str], calm: Mapping[str, int], share: float, now: float
    ) -> int:
        """Places of those who flood the device, of which they together have `share`, in this step.

        calm: tenant -> places, of the others. If all steps were as large lately, as after a flood
            that nobody shared
        the device with, nothing tells what rows cost: some smaller ones do.
        """
        most, times = self._options.max_num_seqs, self.times
        free = max(0, most - sum(calm.values()))
        if times.deviation < VARIED * most:
            self._allowance = Allowance(flooding, math.inf, math.inf)
            return int(max(share * most, free / 2))
        join_s, row_s = times.tenant_s * len(flooding), times.row_s
        # A step that they join is longer by what they have of their own, however many rows they
        # bring: at least so many that these make up half of it.
        fewest = max(1.0, min(free, join_s / row_s if row_s else most))
        allowance_s = self._allowance_s(calm, share * self.best_rows_per_s(now), join_s, fewest)
        # What does not make up a step yet is kept for the next one, more is not: nobody saves up
        # service.
        kept_s = min(join_s + fewest * row_s, self._allowance.balance_s)
        self._allowance = Allowance(flooding, allowance_s, allowance_s + kept_s)
        left_s = self._allowance.balance_s - join_s
        if left_s < fewest * row_s:
            return 0
        return min(most, int(left_s / row_s)) if row_s * most > left_s else most

    def _allowance_s(
        self, calm: Mapping[str, int], rows_per_s: float, join_s: float, fewest: float
    ) -> float:
        """Seconds by which those who flood the device may make this step longer, on average: for
        `rows_per_s`, their share of what it does at its best, or `max_interference`.

        The step of the others alone would take s seconds. `rows` more in every step come at that
        rate if rows = rows_per_s * (s + join_s + row_s * rows); `fewest` more in a part of the
        steps, if part * fewest = rows_per_s * (s + part * (join_s + row_s * fewest)).
        """
        row_s = self.times.row_s
        reading = (
            r.unread for n, count in calm.items() for r in first_of(self._requests(n), count)
        )
        rows = min(self._options.max_num_seqs, sum(calm.values()))
        alone_s = self.times.seconds(len(calm), rows, min(self.chunk, sum(reading)))
        every = rows_per_s * (alone_s + join_s) / (1 - rows_per_s * row_s)
        if every >= fewest:
            own_s = join_s + every * row_s
        else:
            part = rows_per_s * alone_s / (fewest * (1 - rows_per_s * row_s) - rows_per_s * join_s)
            own_s = part * (join_s + fewest * row_s)
        return max(own_s, self._options.max_interference * alone_s)

    def charge(self, parts: Mapping[Request, Part]) -> None:
        """Take what a step's parts cost from the balance of those who flood the device."""
        theirs = {r: part for r, part in parts.items() if r.tenant in self._allowance.tenants}
        self._allowance.balance_s -= self.times.tenant_s * len({r.tenant for r in theirs}) + sum(
            self.times.row_s + self.times.token_s * part.read for part in theirs.values()
        )

    def room(self) -> int:
        """Tokens of prompts that those who flood the device read in a step at most. What is beyond
        their allowance they pay for in the steps after that; this keeps it short."""
        most = self._options.max_num_batched_tokens
        token_s, allowance_s = self.times.token_s, self._allowance.allowance_s
        if not self._allowance.tenants or 2 * allowance_s >= most * token_s:
            return most
        return max(SMALLEST_PIECE, int(2 * allowance_s / token_s))
