"""What tenants ask for is counted in rows that they are likely to take, beside what the device can
do."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import SamplingParams
from common.serving.demand import RECENT_S, Demand
from common.serving.request import Request
from common.serving.tenant_text import TenantText


def request(tenant: str, at: float = 0.0, most: int = 100, got: int = 0, read: int = 8) -> Request:
    made = Request(
        tenant, (1,) * read, most, SamplingParams(), TenantText(tenant, Path("/nonexistent")), at
    )
    made.token_ids += [1] * got
    return made


def alike(tenant: str) -> float:
    return 1.0


def rows(demand: Demand, made: Request) -> float:
    return demand.rows(made, 0.0)


def test_a_backlog_is_what_came_less_what_the_device_could_have_done() -> None:
    demand = Demand()
    for i in range(10):
        demand.passed(float(i), 50.0, alike)
        demand.arrived(request("a", float(i)), 0.0)
    assert sum(demand.backlog.values()) == pytest.approx(10 * 100 - 9 * 50)
    demand.passed(15.0, 50.0, alike)
    assert sum(demand.backlog.values()) == pytest.approx(250)
    demand.passed(100.0, 50.0, alike)
    assert sum(demand.backlog.values()) == 0
    # Idle time is not saved up.
    demand.arrived(request("a", 100.0), 0.0)
    demand.passed(101.0, 50.0, alike)
    assert sum(demand.backlog.values()) == pytest.approx(50)


def test_a_backlog_is_worked_off_fairly() -> None:
    """As by generalized processor sharing: what one does not need goes to the others, by weight."""
    demand = Demand()
    demand.passed(0.0, 10.0, alike)
    for name, most in (("a", 10), ("b", 100), ("c", 400)):
        demand.arrived(request(name, most=most), 0.0)
    demand.passed(15.0, 10.0, {"a": 1.0, "b": 1.0, "c": 2.0}.__getitem__)
    # Of 150 rows a takes its 10; b and c share 140 as 1 : 2.
    assert demand.backlog == pytest.approx({"b": 100 - 140 / 3, "c": 400 - 280 / 3})
    demand.passed(1e6, 10.0, alike)
    assert not demand.backlog


def test_a_clock_that_is_read_out_of_turn_passes_once() -> None:
    demand = Demand()
    demand.passed(0.0, 10.0, alike)
    demand.arrived(request("a"), 0.0)
    for now in (5.0, 4.0, 5.0, 6.0):
        demand.passed(now, 10.0, alike)
    assert sum(demand.backlog.values()) == pytest.approx(40)


def test_tenants_are_recent_for_a_while() -> None:
    demand = Demand()
    demand.arrived(request("a", 0.0), 0.0)
    demand.arrived(request("b", 50.0), 0.0)
    assert demand.tenants(RECENT_S - 1) == {"a", "b"}
    assert demand.tenants(RECENT_S + 1) == {"b"}


def test_answers_are_as_long_as_the_tenants_were() -> None:
    demand = Demand()
    assert rows(demand, request("a")) == 100
    demand.answered(request("a", most=200, got=50))
    assert rows(demand, request("a")) == 25
    assert rows(demand, request("a", most=8)) == 2
    # Of a tenant that had no answer yet: as the others'.
    assert rows(demand, request("b")) == 25
    demand.answered(request("b", most=200, got=200))
    assert rows(demand, request("b")) == 100
    assert rows(demand, request("c")) == pytest.approx(100 * 250 / 400)
    for _ in range(400):
        demand.answered(request("a", most=100, got=80))
    assert rows(demand, request("a")) == pytest.approx(80, rel=0.02)


def test_a_prompt_counts_as_what_costs_the_same_time() -> None:
    demand = Demand()
    assert demand.rows(request("a", most=10, read=400), 0.05) == pytest.approx(30.0)
    demand.passed(0.0, 1.0, alike)
    demand.arrived(request("a", most=10, read=400), 0.05)
    assert sum(demand.backlog.values()) == pytest.approx(30.0)


def test_a_tenant_that_left_is_forgotten() -> None:
    demand = Demand()
    for name in "ab":
        demand.answered(request(name, got=10))
        demand.arrived(request(name), 0.0)
    demand.forget("a")
    assert demand.tenants(1.0) == {"b"}
    demand.forget("b")
    assert rows(demand, request("a")) == 100


def test_what_is_found_in_the_cache_is_no_demand() -> None:
    demand, made = Demand(), request("a", most=10, read=100)
    demand.arrived(made, 0.5)
    assert demand.backlog["a"] == demand.rows(made, 0.5) == 10 + 50
    made.num_cached_tokens = 80
    demand.found(made, 0.5)
    assert demand.backlog["a"] == demand.rows(made, 0.5) == 10 + 10
    demand.passed(1.0, 15.0, alike)
    demand.found(made, 0.5)
    assert demand.backlog["a"] == 0
