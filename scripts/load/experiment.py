"""Systems under the same arrivals, one after another, each at rising rates.

How fast the first system can be is measured first, closed-loop: with as many requests under way as
it batches, the rate of answers is the rate at which it saturates. Rates are then shares of that
one: its load. The same measurement gives every system's saturation rate.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import numpy as np

from common import MoetelError
from scripts.load.run import Record, System, capacity, run_trace, warm_up
from scripts.load.summary import Goodput, report
from scripts.load.traffic import Call, Flood, Load, Trace, TrafficError, make_trace

log = logging.getLogger(__name__)

JUDGED_LOAD = 0.7
FLOODED = ("moetel", "http")
"""Systems that are tested under a flood as well."""

LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)
WARM_UP_S = 60.0
"""Longest warm-up, in seconds; what is not answered by then is given up."""

Opener = Callable[[], Awaitable[System]]


@dataclass(frozen=True)
class Experiment:
    """What is done with every system.

    vocab_sizes: of each tenant. request_rates: requests a second; None: `loads`, shares of the
        first system's capacity.
    duration_s, num_requests: of each test; one of them. capacity_s: of the closed-loop measurement;
        0: none.
    settle_s: how long a system that compiles steps as they come may be warmed up until it compiles
        no more. Such a system is then given an unmeasured trace before each test, half as long.
    drain_s: how long answers are waited for after the last arrival. concurrency: of the closed-loop
        measurement.
    flood_factor: how many times its rate `flood_tenant` sends in a second test of `FLOODED` at the
        judged rate, from a quarter of the time on; 0 or 1: none.
    """

    vocab_sizes: Mapping[str, int]
    load: Load = field(default_factory=Load)
    request_rates: tuple[float, ...] | None = None
    loads: tuple[float, ...] = LOADS
    duration_s: float | None = 15.0
    num_requests: int | None = None
    drain_s: float = 15.0
    capacity_s: float = 6.0
    settle_s: float = 180.0
    concurrency: int = 16
    percentiles: tuple[float, ...] = (50, 90, 95, 99)
    goodput: Goodput = field(default_factory=Goodput)
    flood_factor: float = 8.0
    flood_tenant: str | None = None

    def trace(self, rate: float, flood: Flood | None = None) -> Trace:
        return make_trace(
            self.vocab_sizes,
            self.load,
            rate,
            duration_s=self.duration_s,
            num_requests=self.num_requests,
            flood=flood,
        )

    def flood(self, trace: Trace) -> Flood | None:
        """What comes on top of a trace, if anything does."""
        tenant = self.flood_tenant or list(self.vocab_sizes)[-1]
        if self.flood_factor <= 1 or len(self.vocab_sizes) < 2 or not trace.horizon_s:
            return None
        return Flood(tenant, self.flood_factor, trace.horizon_s / 4)

    def prelude(self, trace: Trace) -> Trace:
        """Other requests at a trace's rate for half of its time."""
        load = replace(self.load, seed=self.load.seed + 1)
        count = max(1, len(trace.calls) // 2)
        return make_trace(self.vocab_sizes, load, trace.request_rate, num_requests=count)

    def some_calls(self, count: int) -> list[Call]:
        """Requests of all tenants alike, to warm up with."""
        even = replace(self.load, skew=0.0, seed=self.load.seed + 1)
        calls = make_trace(
            self.vocab_sizes, even, 1.0, num_requests=max(count, len(self.vocab_sizes))
        ).calls
        return list(calls)


@dataclass
class Cell:
    """One test. load: its rate as a share of the first system's capacity, where that is known."""

    system: str
    request_rate: float
    load: float | None
    judged: bool
    result: dict[str, Any]
    records: list[Record] = field(repr=False, default_factory=list)
    flood: Flood | None = None

    def to_json(self) -> dict[str, Any]:
        flood = None if self.flood is None else self.flood.__dict__
        named = {
            "system": self.system,
            "request_rate": self.request_rate,
            "load": self.load,
            "judged": self.judged,
        }
        return {**named, "flood": flood, **self.result}


@dataclass
class Comparison:
    """What was found.

    capacity: requests a second at which each system saturates. systems: what each tells of itself.
    pairs, floods, aims: see `benchmarks.lab`. Results of two systems tested in turn, by name; how a
        flood moved the other tenants' p95 in each of these tests; whether the aims were met.
    """

    capacity: dict[str, float] = field(default_factory=dict)
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    pairs: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    floods: list[float] = field(default_factory=list)
    aims: list[str] = field(default_factory=list)

    def judged(self, system: str) -> Cell | None:
        """A system's test at the judged rate, without a flood."""
        return next(
            (c for c in self.cells if c.system == system and c.judged and c.flood is None), None
        )

    def flood(self) -> str | None:
        """How a flood moves the other tenants' p95 of E2EL, over requests from its beginning on."""
        flooded = next((c for c in self.cells if c.flood is not None), None)
        calm = None if flooded is None else self.judged(flooded.system)
        if calm is None or flooded is None or flooded.flood is None:
            return None
        flood = flooded.flood
        values = self.floods or [
            others_p95(flooded.records, flood) / others_p95(calm.records, flood)
        ]
        if not all(value > 0 for value in values):
            return None
        note = f"{len(others_ms(calm.records, flood))} requests of the others"
        if self.floods:
            span = f"{min(values):.3g} to {max(values):.3g}"
            note = f"median of {len(values)} pairs tested in turn, {span}"
        return (
            f"p95 E2EL of the other tenants, flooded / not, {flood.factor:g} times the rate of "
            f"{flood.tenant}: {statistics.median(values):.3g}; {note}"
        )


async def compare(
    openers: Mapping[str, Opener],
    experiment: Experiment,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    on_step: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Test systems in the order of `openers`, each loaded alone and closed before the next.

    A system that is saturated is tested at no higher rate but the judged one. One that fails is
    passed over, and `systems` says why. Raises MoetelError if the first one does, since rates
    follow from it, or all do.
    """
    found = Comparison()
    rates: list[tuple[float, float | None, bool]] = []
    for name, opener in openers.items():
        on_step(f"loading {name}")
        try:
            system = await opener()
            try:
                await prepare(system, experiment, found, on_step)
                if not rates:
                    rates = _rates(experiment, found.capacity.get(name))
                await _test(system, experiment, rates, found, on_cell, on_step)
                found.systems[name] = await system.about()
            finally:
                await system.close()
        except MoetelError as error:
            if not found.cells:
                raise
            on_step(f"{name} failed: {error}")
            found.systems[name] = {"error": str(error)}
    return found


async def prepare(
    system: System, experiment: Experiment, found: Comparison, on_step: Callable[[str], None]
) -> None:
    """Warm up, and measure how much the system can do: again, until it compiles nothing new
    meanwhile."""
    most = experiment.concurrency
    calls = cycle(experiment.some_calls(4 * most))
    # Where replacements take long each tenant is asked once; more at once changes nothing there.
    slow = getattr(system, "slow_to_switch", False)
    sizes = [len(experiment.vocab_sizes) if slow else most]
    begun = time.perf_counter()
    while True:
        on_step(f"warming up {system.name}")
        before = await compilations(system)
        try:
            for size in sizes:
                await asyncio.wait_for(warm_up(system, list(islice(calls, size))), WARM_UP_S)
        except TimeoutError:
            log.warning(
                "%s was not warm after %.0f s; its first figures may be too bad",
                system.name,
                WARM_UP_S,
            )
        if experiment.capacity_s:
            on_step(f"measuring the saturation rate of {system.name}")
            some = list(islice(calls, 4 * most))
            found.capacity[system.name] = await capacity(system, some, most, experiment.capacity_s)
        if (
            await compilations(system) == before
            or time.perf_counter() - begun > experiment.settle_s
        ):
            return
        if sizes == [most]:
            sizes = [2**n for n in range(most.bit_length()) if 2**n < most] + [most]


async def compilations(system: System) -> int:
    """How many steps a system has compiled so far; 0 if it compiles none, or does not tell."""
    return int((await system.about()).get("compilations", 0))


def _rates(experiment: Experiment, first: float | None) -> list[tuple[float, float | None, bool]]:
    """(rate, share of the first system's capacity, whether it is the judged one), ascending.

    Among rates that were given the one nearest to `JUDGED_LOAD` is judged.
    """
    if experiment.request_rates is not None:
        rates = sorted(experiment.request_rates)
        near = min(rates, key=lambda r: abs(r / first - JUDGED_LOAD)) if first else rates[-1]
        return [(r, r / first if first else None, r == near) for r in rates]
    if not first:
        raise TrafficError(
            "the first system answered nothing while its saturation rate was measured; give "
            "--request-rate, or a "
            "longer --duration"
        )
    return [
        (share * first, share, share == JUDGED_LOAD)
        for share in sorted({*experiment.loads, JUDGED_LOAD})
    ]


async def _test(
    system: System,
    experiment: Experiment,
    rates: Sequence[tuple[float, float | None, bool]],
    found: Comparison,
    on_cell: Callable[[Cell], None],
    on_step: Callable[[str], None],
) -> None:
    saturated = False

    async def test(
        rate: float, load: float | None, judged: bool, flood: Flood | None = None
    ) -> Cell:
        flooded = "" if flood is None else f", flooded by {flood.tenant}"
        on_step(f"{system.name} at {rate:.3g} requests/s{flooded}")
        trace = experiment.trace(rate, flood)
        before = await compilations(system)
        if before:
            await run_trace(system, experiment.prelude(trace), experiment.drain_s)
            before = await compilations(system)
        records = await run_trace(system, trace, experiment.drain_s)
        result = report(records, trace.horizon_s, experiment.percentiles, experiment.goodput)
        result["compilations"] = await compilations(system) - before
        cell = Cell(system.name, rate, load, judged, result, records, flood)
        found.cells.append(cell)
        on_cell(cell)
        return cell

    for rate, load, judged in rates:
        if saturated and not judged:
            continue
        saturated |= (await test(rate, load, judged)).result["saturated"]
        flood = experiment.flood(experiment.trace(rate))
        if judged and flood is not None and system.name in FLOODED:
            await test(rate, load, judged, flood)


def others_p95(records: Sequence[Record], flood: Flood) -> float:
    """Of the tenants that do not flood, in milliseconds; NaN if there is no request of theirs."""
    times = others_ms(records, flood)
    return float(np.percentile(times, 95)) if times else math.nan


def others_ms(records: Sequence[Record], flood: Flood) -> list[float]:
    """E2EL of the tenants that do not flood, of those that were given up the time that they had
    waited."""
    return [
        (r.e2el_s if r.error is None else r.ended_s - r.call.at_s) * 1e3
        for r in records
        if r.call.tenant != flood.tenant and r.call.at_s >= flood.from_s
    ]
