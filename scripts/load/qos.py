"""The QoS experiment: systems under the same arrivals, one after another, each at rising rates.

How fast the first system (`single`: one model) can be is measured first, closed-loop: with as many
requests under way as it batches, the rate of answers is the rate at which it saturates. Rates are
then shares of that one: its load. The same measurement gives every system's saturation rate.

Minutes lie between the tests of two systems, and on a shared machine its speed changes meanwhile.
What Moetel's latency is beside one model's is therefore asked again with both loaded, in turn,
under the same arrivals (`Experiment.pairs`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import numpy as np

from common import MoetelError
from scripts.load.load_test import Goodput, Record, System, capacity, report, run_trace, warm_up
from scripts.load.traffic import Call, Flood, Load, Trace, TrafficError, make_trace

log = logging.getLogger(__name__)

JUDGED_LOAD = 0.7
OURS = "moetel"
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
    pairs: how often the first system and Moetel are tested in turn at the judged rate, each time
        under other arrivals, both loaded; 0: not at all. Takes memory for both.
    flood_factor: how many times its rate `flood_tenant` sends in a second test of `flooded` at the
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
    pairs: int = 0
    flood_factor: float = 8.0
    flood_tenant: str | None = None
    flooded: tuple[str, ...] = ("moetel", "http")

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
    """capacity: requests a second at which each system saturates. systems: what each tells about
    itself.
    pairs: results of both systems of each pair, by name. floods: Moetel's p95 for the other tenants
    under a flood over that without, one test after the other, each time under other arrivals."""

    capacity: dict[str, float] = field(default_factory=dict)
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    pairs: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    floods: list[float] = field(default_factory=list)

    def judged(self, system: str) -> Cell | None:
        """A system's test at the judged rate, without a flood."""
        return next(
            (c for c in self.cells if c.system == system and c.judged and c.flood is None), None
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
                await _prepare(system, experiment, found, on_step)
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
    first = next(iter(openers))
    judged = next((rate for rate, _, is_judged in rates if is_judged), None)
    if experiment.pairs and judged and first != OURS and found.judged(OURS) is not None:
        await _test_in_turn(
            [(name, openers[name]) for name in (first, OURS)], experiment, judged, found, on_step
        )
    return found


async def _test_in_turn(
    openers: Sequence[tuple[str, Opener]],
    experiment: Experiment,
    rate: float,
    found: Comparison,
    on_step: Callable[[str], None],
) -> None:
    """Fill `found.pairs` and `found.floods`: both systems loaded, one tested after the other, then
    the other way round."""
    systems: list[System] = []
    try:
        for name, opener in openers:
            on_step(f"loading {name}, to be tested in turn")
            systems.append(await opener())
            await _prepare(systems[-1], replace(experiment, capacity_s=0.0), found, on_step)
        for number in range(experiment.pairs):
            other = replace(
                experiment, load=replace(experiment.load, seed=experiment.load.seed + 100 + number)
            )
            trace = other.trace(rate)
            on_step(f"in turn at {rate:.3g} requests/s, pair {number + 1} of {experiment.pairs}")
            pair = {}
            for system in systems if number % 2 else systems[::-1]:
                if await compilations(system):
                    await run_trace(system, experiment.prelude(trace), experiment.drain_s)
                records = await run_trace(system, trace, experiment.drain_s)
                pair[system.name] = report(
                    records, trace.horizon_s, experiment.percentiles, experiment.goodput
                )
                if system.name == OURS and (flood := experiment.flood(trace)) is not None:
                    flooded = await run_trace(system, other.trace(rate, flood), experiment.drain_s)
                    if (moved := _others_p95(flooded, flood) / _others_p95(records, flood)) > 0:
                        found.floods.append(moved)
            found.pairs.append(pair)
    finally:
        for system in systems:
            await system.close()


async def _prepare(
    system: System, experiment: Experiment, found: Comparison, on_step: Callable[[str], None]
) -> None:
    """Warm up, and measure how much the system can do: again, until it compiles nothing new
    meanwhile."""
    most = experiment.concurrency
    calls = cycle(experiment.some_calls(4 * most))
    # Where replacements take long each tenant is asked once; more at once changes nothing there.
    sizes = [len(experiment.vocab_sizes) if system.name in ("paper", "time_sharing") else most]
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
        if judged and flood is not None and system.name in experiment.flooded:
            await test(rate, load, judged, flood)


# What is asked of Moetel.


@dataclass(frozen=True)
class Judgement:
    """One question. value: None where it was not measured. at_most, at_least: the aim."""

    what: str
    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def __str__(self) -> str:
        aim = (
            f"at most {self.at_most:g}"
            if self.at_most is not None
            else f"at least {self.at_least:g}"
        )
        shown = "not measured" if self.value is None else f"{self.value:.3g}"
        verdict = {None: "", True: ", met", False: ", MISSED"}[self.met]
        return f"{self.what}: {shown} (aim {aim}{verdict}){'; ' + self.note if self.note else ''}"


def judge(found: Comparison, ours: str = OURS) -> list[Judgement]:
    """The aims of the QoS experiment, at the judged rate."""
    cells = {name: found.judged(name) for name in ("single", ours, "partition")}
    mine = cells[ours]

    def latency(name: str) -> float | None:
        cell = cells[name]
        return None if cell is None else cell.result["mean_e2el_at_least_ms"]

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or not b else a / b

    at = "" if mine is None else f" at {mine.request_rate:.3g} requests/s"
    if mine is not None and mine.load is not None:
        at += f" ({mine.load:.0%} load of one model)"
    beside = ratio(latency(ours), latency("single"))
    how = "one test each, one after the other"
    each = [
        pair[ours]["mean_e2el_at_least_ms"] / pair["single"]["mean_e2el_at_least_ms"]
        for pair in found.pairs
    ]
    if each:
        beside = float(np.median(each))
        how = f"median of {len(each)} pairs tested in turn, {min(each):.3g} to {max(each):.3g}"
    cut = cells["partition"] is not None and cells["partition"].result["failed"] > 0
    return [
        Judgement(
            f"mean E2EL, {ours} / single{at}", beside, at_most=1.1, note=how if beside else ""
        ),
        Judgement(
            f"mean E2EL, {ours} / partition{at}",
            ratio(latency(ours), latency("partition")),
            at_most=0.15,
            note="partition did not finish in time, so the true ratio is smaller" if cut else "",
        ),
        Judgement(
            f"saturation rate, {ours} / paper",
            ratio(found.capacity.get(ours), found.capacity.get("paper")),
            at_least=3.0,
        ),
        Judgement(
            f"share of TTFT that reconfiguration takes{at}",
            None if mine is None else mine.result["reconfiguration_share_of_ttft"],
            at_most=0.05,
        ),
        _flood_judgement(found, ours),
    ]


def _flood_judgement(found: Comparison, ours: str) -> Judgement:
    """How the other tenants' p95 of E2EL moves, over requests that come after the flood has
    begun."""
    what = "p95 E2EL of the other tenants, flooded / not"
    calm = found.judged(ours)
    flooded = next((c for c in found.cells if c.system == ours and c.flood is not None), None)
    if calm is None or flooded is None or flooded.flood is None:
        return Judgement(what, None, at_most=1.2)
    value = _others_p95(flooded.records, flooded.flood) / _others_p95(calm.records, flooded.flood)
    if not value > 0:
        return Judgement(what, None, at_most=1.2)
    note = f"{len(_others_ms(calm.records, flooded.flood))} requests of the others"
    if found.floods:
        value = float(np.median(found.floods))
        span = f"{min(found.floods):.3g} to {max(found.floods):.3g}"
        note = f"median of {len(found.floods)} pairs tested in turn, {span}"
    return Judgement(
        f"{what}, {flooded.flood.factor:g} times the rate of {flooded.flood.tenant}",
        value,
        at_most=1.2,
        note=note,
    )


def _others_p95(records: Sequence[Record], flood: Flood) -> float:
    """Of the tenants that do not flood, in milliseconds; NaN if there is no request of theirs."""
    times = _others_ms(records, flood)
    return float(np.percentile(times, 95)) if times else math.nan


def _others_ms(records: Sequence[Record], flood: Flood) -> list[float]:
    """E2EL of the tenants that do not flood, of those that were given up the time that they had
    waited."""
    return [
        (r.e2el_s if r.error is None else r.ended_s - r.call.at_s) * 1e3
        for r in records
        if r.call.tenant != flood.tenant and r.call.at_s >= flood.from_s
    ]
