"""Moetel and the first system tested in turn, both loaded.

Minutes lie between the tests of two systems, and on a shared machine its speed changes meanwhile.
What is tested in turn is hit alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from benchmarks.lab.judge import OURS
from scripts.load.experiment import (
    Comparison,
    Experiment,
    Opener,
    compilations,
    others_p95,
    prepare,
)
from scripts.load.run import System, run_trace
from scripts.load.summary import report


async def test_in_turn(
    openers: Mapping[str, Opener],
    experiment: Experiment,
    pairs: int,
    found: Comparison,
    on_step: Callable[[str], None],
) -> None:
    """Fill `found.pairs` and `found.floods`, if Moetel was compared with another system.

    Both are loaded and tested one after the other at the judged rate, then the other way round,
    each time under other arrivals.
    """
    first = next(iter(openers))
    judged = found.judged(OURS)
    if not pairs or judged is None or first == OURS:
        return
    rate = judged.request_rate
    systems: list[System] = []
    try:
        for name in (first, OURS):
            on_step(f"loading {name}, to be tested in turn")
            systems.append(await openers[name]())
            await prepare(systems[-1], replace(experiment, capacity_s=0.0), found, on_step)
        for number in range(pairs):
            other = replace(
                experiment, load=replace(experiment.load, seed=experiment.load.seed + 100 + number)
            )
            trace = other.trace(rate)
            on_step(f"in turn at {rate:.3g} requests/s, pair {number + 1} of {pairs}")
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
                    if (moved := others_p95(flooded, flood) / others_p95(records, flood)) > 0:
                        found.floods.append(moved)
            found.pairs.append(pair)
    finally:
        for system in systems:
            await system.close()
