"""What tenants ask for is counted in rows that they are likely to take."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from common import SamplingParams
from common.demand import FEWEST, RECENT, Demand
from common.request import Request
from common.text import TenantText


def request(tenant: str, at: float, most: int = 100, got: int = 0, read: int = 8) -> Request:
    made = Request(tenant, (1,) * read, most, SamplingParams(), TenantText(tenant, Path("/nonexistent")), at)
    made.token_ids += [1] * got
    return made


def rows(demand: Demand, made: Request) -> float:
    return demand.rows(made, 0.0)


def arrive(demand: Demand, tenant: str, count: int, every_s: float, begin_s: float = 0.0, most: int = 100) -> float:
    """When the next one would come."""
    for i in range(count):
        demand.arrived(request(tenant, begin_s + i * every_s, most))
    return begin_s + count * every_s


def test_the_rate_is_that_of_recent_arrivals() -> None:
    demand = Demand()
    now = arrive(demand, "a", 200, 2.0)
    assert demand.rows_per_s(now, 1e6, 0.0) == pytest.approx(50.0)
    # What came long ago is left out, whatever came since.
    now = arrive(demand, "b", RECENT, 0.5, now)
    assert demand.rows_per_s(now, 1e6, 0.0) == pytest.approx(200.0)
    assert demand.tenants == {"b"}


def test_a_pause_is_no_slow_traffic() -> None:
    demand = Demand()
    arrive(demand, "a", RECENT, 1.0)
    now = arrive(demand, "b", FEWEST, 1.0, 10_000.0)
    assert demand.rows_per_s(now, 60.0, 0.0) == pytest.approx(100.0)
    assert demand.tenants == {"b"}


def test_few_arrivals_say_nothing_and_arrivals_at_once_everything() -> None:
    demand = Demand()
    arrive(demand, "a", FEWEST - 1, 1.0)
    assert demand.rows_per_s(FEWEST, 1e6, 0.0) == 0.0
    arrive(demand, "a", RECENT, 0.0, 50.0)
    assert demand.rows_per_s(50.0, 1e6, 0.0) == math.inf
    assert demand.rows_per_s(66.0, 1e6, 0.0) == pytest.approx(100 * RECENT / 16)


def test_answers_are_as_long_as_the_tenants_were() -> None:
    demand = Demand()
    assert rows(demand, request("a", 0.0)) == 100
    demand.answered(request("a", 0.0, most=200, got=50))
    assert rows(demand, request("a", 0.0)) == 25
    assert rows(demand, request("a", 0.0, most=8)) == 2
    # Of a tenant that had no answer yet: as the others'.
    assert rows(demand, request("b", 0.0)) == 25
    demand.answered(request("b", 0.0, most=200, got=200))
    assert rows(demand, request("b", 0.0)) == 100
    assert rows(demand, request("c", 0.0)) == pytest.approx(100 * 250 / 400)
    for _ in range(400):
        demand.answered(request("a", 0.0, most=100, got=80))
    assert rows(demand, request("a", 0.0)) == pytest.approx(80, rel=0.02)


def test_a_tenant_that_left_is_forgotten() -> None:
    demand = Demand()
    for name in "ab":
        demand.answered(request(name, 0.0, got=10))
        arrive(demand, name, 10, 1.0)
    demand.forget("a")
    assert demand.tenants == {"b"}
    demand.forget("b")
    assert rows(demand, request("a", 0.0)) == 100


def test_a_prompt_counts_as_what_costs_the_same_time() -> None:
    demand = Demand()
    assert demand.rows(request("a", 0.0, most=10, read=400), 0.05) == pytest.approx(30.0)
    for i in range(RECENT):
        demand.arrived(request("a", float(i), most=10, read=400))
    assert demand.rows_per_s(RECENT, 1e6, 0.05) == pytest.approx(30.0)
