"""A tenant that asks for more than the device could give it, beside tenants that do not."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest

from common import (
    SchedulerOptions,
)
from common.serving.backend import Part, Step
from common.serving.engine import Engine
from common.serving.fake import FakeBackend, fake_engine
from tests.common.serving.requests import TENANTS, params
from tests.helpers import rest_slow


def test_a_flood_does_not_keep_another_tenant_waiting() -> None:
    engine, backend = fake_engine(TENANTS, SchedulerOptions(max_num_seqs=8, prefill_chunk=32))
    for _ in range(200):
        engine.submit("a", [1] * 30, params(30, ignore_eos=True))
    for _ in range(50):
        engine.step()
    begun = len(backend.steps)
    late = engine.submit("b", [2] * 30, params(30, ignore_eos=True))
    while not late.done:
        engine.step()
    # One step to read the prompt, one for each token after the first: the flood costs it nothing.
    assert len(backend.steps) - begun == 30


@dataclasses.dataclass
class Flooded:
    """An engine whose steps take 1 s and `row_s` more for each row, `tenant_s` for each tenant;
    `a`, `b` and `c` have few requests at a time, `d` floods it after 200 steps.

    asked, rows: each tenant's unfinished requests before each of the steps, and its rows in it.
    """

    engine: Engine
    backend: FakeBackend
    asked: list[dict[str, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def run(
        cls,
        monkeypatch: pytest.MonkeyPatch,
        row_s: float,
        steps: int = 600,
        rate: float = 0.15,
        tenant_s: float = 0.0,
        **options: Any,
    ) -> Flooded:
        chosen = SchedulerOptions(max_num_seqs=32, prefill_chunk=64, max_queue=10**6, **options)
        engine, backend = fake_engine(TENANTS, chosen)
        found = cls(engine, backend)
        clock, compute = 0.0, backend.step

        def step(parts: Sequence[Part]) -> Step:
            nonlocal clock
            tenants = {backend._sequences[p.sequence].row.tenant for p in parts}
            clock += 1 + row_s * len(parts) + tenant_s * len(tenants)
            return compute(parts)

        monkeypatch.setattr("common.serving.steps.time.perf_counter", lambda: clock)
        monkeypatch.setattr(backend, "step", step)
        rng = random.Random(1)
        for i in range(steps):
            for name in TENANTS:
                if rng.random() < rate:
                    engine.submit(name, [1] * rng.randrange(4, 20), params(30, ignore_eos=True))
            if i == 200:
                found.ask("d", 1000)
            found.asked.append({n: len(engine._steps.scheduler.requests(n)) for n in TENANTS})
            engine.step()
        return found

    def ask(self, tenant: str, count: int) -> None:
        for _ in range(count):
            self.engine.submit(tenant, [1] * 8, params(30, ignore_eos=True))

    def steps(self, count: int, **how: Any) -> dict[str, int]:
        """Take so many; what the last one held."""
        for _ in range(count):
            self.engine._steps.step(**how)
        return self.rows[-1]

    @property
    def rows(self) -> list[dict[str, int]]:
        return [
            {n: sum(name == n for name, _ in step) for n in TENANTS} for step in self.backend.steps
        ]


@pytest.mark.parametrize("interference", [0.0, 0.1, 0.4])
def test_a_flood_gets_its_share_of_the_throughput_and_what_slows_the_others_little(
    monkeypatch: pytest.MonkeyPatch, interference: float
) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.05, max_interference=interference)
    after = list(zip(flood.asked, flood.rows, strict=True))[230:]
    seconds = tokens = alone = full = 0.0
    for asked, rows in after:
        assert all(rows[n] == asked[n] for n in "abc" if asked[n] <= 8), (
            "others wait for a flood's rows"
        )
        seconds += 1 + 0.05 * sum(rows.values())
        alone += 1 + 0.05 * (sum(rows.values()) - rows["d"])
        tokens += rows["d"]
        full += sum(rows.values()) == 32
    held = {n: flood.engine.stats()["tenants"][n]["flood_steps"] for n in TENANTS}
    assert held["d"] > 0.9 * len(after) and sum(held[n] for n in "abc") < 0.1 * held["d"]
    best = 32 / (1 + 0.05 * 32)
    share = tokens / seconds / best
    slower = seconds / alone - 1
    if interference == 0.4:  # takes more rows than its share does
        assert share > 0.35 and 0.33 < slower < 0.4
    else:
        assert share == pytest.approx(0.25, abs=0.02) and slower > 0.1 and not full


def test_a_flood_joins_few_steps_with_many_rows_where_tenants_cost_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a tenant has of its own is read once for all of its rows: with its share in every step
    it would pay more for that than for them."""
    monkeypatch.setattr("common.serving.demand.RECENT_S", math.inf)
    flood = Flooded.run(monkeypatch, row_s=0.05, tenant_s=0.5, rate=0.04, max_interference=0.0)
    after = [rows for rows in flood.rows[230:] if sum(rows.values()) > rows["d"]]
    joined = [rows["d"] for rows in after if rows["d"]]
    seconds = sum(
        1 + 0.5 * sum(map(bool, rows.values())) + 0.05 * sum(rows.values()) for rows in after
    )
    best = 32 / (1 + 0.5 * 4 + 0.05 * 32)
    assert sum(joined) / seconds == pytest.approx(0.25 * best, rel=0.15)
    assert 0.2 * len(after) < len(joined) < 0.8 * len(after)
    # At least half of what a step is longer by is rows: 0.5 s.
    assert 9 <= median(joined) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("row_s", rest_slow([0.0, 0.05]))
def test_what_rows_cost_is_found_out_where_a_flood_was_first(
    monkeypatch: pytest.MonkeyPatch, row_s: float
) -> None:
    """After many steps of one size nothing tells whether the others would be better off with
    smaller ones."""
    flood = Flooded.run(monkeypatch, row_s=row_s, steps=0)
    flood.ask("d", 5000)
    assert flood.steps(400)["d"] == 32
    begun = len(flood.rows)
    for i in range(400):
        if i % 4 == 0:
            flood.ask("abc"[i % 3], 1)
        flood.steps(1)
    places = [rows["d"] for rows in flood.rows[begun + 30 :]]
    if row_s:
        assert max(places) < 16 and sum(places) < 9 * len(places)
    else:  # few steps are small, so that one knows
        assert sum(places) > 0.9 * sum(
            32 - sum(r[n] for n in "abc") for r in flood.rows[begun + 30 :]
        )


def test_tenants_that_ask_for_more_than_their_shares_divide_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {"d": 2.0}
    flood = Flooded.run(monkeypatch, row_s=0.05, steps=300, max_interference=0.0, weights=weights)
    flood.ask("a", 500)
    begun = len(flood.rows)
    flood.steps(150)
    rows = flood.rows[begun + 10 :]
    a, d = (sum(r[n] for r in rows) for n in "ad")
    assert d / a == pytest.approx(2.0, rel=0.15)
    assert sum(sum(r.values()) for r in rows) < 31 * len(rows)


def test_who_has_most_of_a_traffic_that_the_device_can_bear_is_not_held_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A burst of one tenant beyond its share takes the places that it wants."""
    flood = Flooded.run(monkeypatch, row_s=0.05, steps=200, rate=0.05, max_interference=0.0)
    flood.ask("d", 14)
    rows = flood.steps(20)
    assert rows["d"] >= 12 and sum(rows.values()) == len(flood.engine._steps.scheduler.requests())


@pytest.mark.parametrize(
    "options", [{}, {"max_interference": math.inf}], ids=["rows cost nothing", "no bound"]
)
def test_a_flood_takes_every_free_place_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.05 if options else 0.0, **options)
    rows = [sum(rows.values()) for rows in flood.rows[220:]]
    # Where nothing is bound, a few smaller steps show that rows cost nothing.
    assert min(rows) == 32 if options else rows.count(32) > 0.9 * len(rows)


def test_alone_a_tenant_takes_every_place_whatever_rows_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.2, steps=300, max_interference=0.0)
    assert sum(flood.rows[-1].values()) < 32
    for request in [r for n in "abc" for r in flood.engine._steps.scheduler.requests(n)]:
        flood.engine.cancel(request)
    assert flood.steps(4)["d"] == 32


def test_offline_no_place_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = Flooded.run(monkeypatch, row_s=0.2, steps=300, max_interference=0.0)
    assert sum(flood.steps(1).values()) < 32
    assert sum(flood.steps(1, alone=True).values()) == 32


def test_shares_are_not_bounded_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every tenant at work all places are used, by weight."""
    weights = {"a": 3.0, "b": 0.5, "c": 1.5}
    flood = Flooded.run(monkeypatch, row_s=0.2, steps=300, max_interference=0.0, weights=weights)
    for name in "abc":
        flood.ask(name, 30)
    rows = flood.steps(10)
    assert sum(rows.values()) == 32
    assert all(abs(rows[n] - 32 * weights.get(n, 1.0) / 6) <= 1 for n in TENANTS), rows
