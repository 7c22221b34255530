"""Traces of requests: rates, gaps, lengths, and that a seed makes them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.load.traffic import (
    Call,
    Flood,
    Load,
    TrafficError,
    arrivals,
    make_trace,
    shares,
)

TENANTS = {"a": 96, "b": 96, "c": 50, "d": 96}


def test_the_rate_is_what_was_asked_for() -> None:
    trace = make_trace(TENANTS, Load(), 5.0, duration_s=40.0)
    assert len(trace.calls) == 200 and trace.horizon_s == 40.0 and trace.request_rate == 5.0
    times = [c.at_s for c in trace.calls]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 40
    assert [c.number for c in trace.calls] == list(range(200))
    assert {n: sum(c.tenant == n for c in trace.calls) for n in TENANTS} == dict.fromkeys(
        TENANTS, 50
    )
    # Arrivals spread over the time: as many in each half as a Poisson process has, within four
    # deviations.
    assert abs(sum(t < 20 for t in times) - 100) < 4 * math.sqrt(50)
    counted = make_trace(TENANTS, Load(), 5.0, num_requests=30)
    assert len(counted.calls) == 30 and counted.horizon_s == 6.0


def test_a_power_law_divides_the_rate() -> None:
    assert shares(4, 0.0).tolist() == [0.25] * 4
    assert shares(3, 1.0) == pytest.approx(np.array([6, 3, 2]) / 11)
    trace = make_trace(TENANTS, Load(skew=1.0), 10.0, duration_s=100.0)
    counts = [sum(c.tenant == n for c in trace.calls) for n in TENANTS]
    assert counts == [480, 240, 160, 120]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_vary_as_a_gamma_distribution(burstiness: float) -> None:
    times = arrivals(40_000, 1000.0, burstiness, np.random.default_rng(3))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1000 / 40_000, rel=0.01)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    if (
        burstiness == 1
    ):  # the gaps of a Poisson process are exponential: exp(-1) of them above their mean
        assert (gaps > gaps.mean()).mean() == pytest.approx(math.exp(-1), abs=0.01)


def test_infinite_burstiness_is_a_constant_gap() -> None:
    times = arrivals(10, 5.0, math.inf, np.random.default_rng(0))
    assert np.diff(times) == pytest.approx(np.full(9, 0.5))
    assert len(arrivals(0, 5.0, 1.0, np.random.default_rng(0))) == 0


def test_the_seed_makes_the_trace() -> None:
    load = Load(skew=0.5, range_ratio=0.5, seed=7)
    first, again = (make_trace(TENANTS, load, 3.0, duration_s=20.0) for _ in range(2))
    assert first == again
    assert (
        make_trace(TENANTS, Load(skew=0.5, range_ratio=0.5, seed=8), 3.0, duration_s=20.0) != first
    )


def test_lengths_and_token_ids() -> None:
    trace = make_trace(
        TENANTS, Load(input_len=10, output_len=7, range_ratio=0.5), 50.0, duration_s=40.0
    )
    assert {len(c.prompt) for c in trace.calls} == set(range(5, 16))
    assert {c.max_new_tokens for c in trace.calls} == set(range(3, 12))  # floor(3.5) to ceil(10.5)
    ids = {n: {t for c in trace.calls if c.tenant == n for t in c.prompt} for n in TENANTS}
    assert ids["a"] == set(range(3, 96)) and ids["c"] == set(range(3, 50))
    fixed = make_trace(TENANTS, Load(input_len=10, output_len=7), 5.0, duration_s=4.0)
    assert {(len(c.prompt), c.max_new_tokens) for c in fixed.calls} == {(10, 7)}


def test_a_flood_changes_nothing_but_its_tenant() -> None:
    load = Load(range_ratio=0.5, seed=2)
    calm = make_trace(TENANTS, load, 8.0, duration_s=40.0)
    flood = make_trace(TENANTS, load, 8.0, duration_s=40.0, flood=Flood("b", 6.0, 10.0))

    def of(calls: tuple[Call, ...], mine: bool) -> list[tuple[float, tuple[int, ...], int]]:
        return [(c.at_s, c.prompt, c.max_new_tokens) for c in calls if (c.tenant == "b") == mine]

    assert of(calm.calls, False) == of(flood.calls, False)
    assert set(of(calm.calls, True)) < set(of(flood.calls, True))
    extra = set(of(flood.calls, True)) - set(of(calm.calls, True))
    assert len(extra) == 5 * 2 * 30 and min(at for at, _, _ in extra) >= 10.0
    assert [c.number for c in flood.calls] == list(range(len(flood.calls)))


def test_all_at_once() -> None:
    trace = make_trace(TENANTS, Load(), math.inf, num_requests=8)
    assert (
        [c.at_s for c in trace.calls] == [0.0] * 8
        and trace.horizon_s == 0
        and math.isinf(trace.request_rate)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skew": -1.0}, "skew is -1.0"),
        ({"burstiness": 0.0}, "burstiness is 0.0"),
        ({"range_ratio": 1.0}, "range ratio is 1.0"),
        ({"input_len": 0}, "input_len is 0"),
        ({"output_len": 2.5}, "output_len is 2.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_loads_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(TrafficError, match=message):
        Load(**change)  # type: ignore[arg-type]


def test_traces_out_of_range() -> None:
    for message, options in {
        "no tenants": {"vocab_sizes": {}},
        "request rate is 0": {"request_rate": 0.0},
        "either a duration": {"num_requests": 3},
        "infinite request rate": {"request_rate": math.inf},
        "0 requests": {"duration_s": None, "num_requests": 0},
        "'x' is to flood": {"flood": Flood("x", 2.0, 1.0)},
        "flood of 0.5 times": {"flood": Flood("a", 0.5, 1.0)},
        "flood begins at 10": {"flood": Flood("a", 2.0, 10.0)},
    }.items():
        given = {
            "vocab_sizes": TENANTS,
            "load": Load(),
            "request_rate": 1.0,
            "duration_s": 10.0,
        } | options
        with pytest.raises(TrafficError, match=message):
            make_trace(**given)  # type: ignore[arg-type]
