"""The load test's clockwork and its figures, against examples reckoned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from scripts.load.run import UNFINISHED, Piece, Record, capacity, run_trace, warm_up
from scripts.load.summary import Goodput, answered_share, jain, report, service, summarise
from scripts.load.traffic import Call, Load, Trace, TrafficError, make_trace


def record(
    tenant: str,
    at_s: float,
    times: Sequence[float],
    error: str | None = None,
    prompt: int = 4,
    **more: Any,
) -> Record:
    """A request whose tokens came one by one at these times after the start."""
    call = Call(0, tenant, at_s, tuple(range(prompt)), 5)
    ended = more.pop("ended_s", times[-1] if times else at_s)
    return Record(call, at_s, [(t, 1) for t in times], ended, error=error, **more)


# Four requests in 10 s: TTFT 1, 0.5, 2 s; E2EL 2, 0.5, 5 s; TPOT 0.5, none, 1.5 s; gaps 0.4 0.6,
# none, 1 2.
EXAMPLE = [
    record("a", 1.0, [2.0, 2.4, 3.0]),
    record("a", 2.0, [2.5]),
    record("b", 3.0, [5.0, 6.0, 8.0], reconfiguration_s=0.7),
    record("b", 4.0, [], error="EngineError: no"),
]


def test_figures_are_vllms() -> None:
    found = summarise(EXAMPLE, 10.0, (50, 99), Goodput({"ttft": 1000, "e2el": 2000}))
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 7)
    assert found["request_throughput"] == pytest.approx(0.3)
    assert found["output_throughput"] == pytest.approx(0.7)
    assert found["total_token_throughput"] == pytest.approx(1.9)
    assert found["request_goodput"] == pytest.approx(0.2)
    assert found["mean_ttft_ms"] == pytest.approx(3500 / 3) and found[
        "median_ttft_ms"
    ] == pytest.approx(1000)
    assert found["std_ttft_ms"] == pytest.approx(np.std([1000, 500, 2000]))
    assert found["p99_ttft_ms"] == pytest.approx(1980) and found["p50_e2el_ms"] == pytest.approx(
        2000
    )
    assert found["mean_tpot_ms"] == pytest.approx(1000) and found["mean_e2el_ms"] == pytest.approx(
        2500
    )
    assert found["mean_itl_ms"] == pytest.approx(1000) and found["median_itl_ms"] == pytest.approx(
        800
    )
    # a's first runs from 1 to 3, its second from 2 to 2.5, b's begins at 3, as the first ends.
    assert found["max_concurrent_requests"] == 2
    assert summarise(EXAMPLE, 10.0)["request_goodput"] is None


def test_no_answers_at_all() -> None:
    found = summarise([EXAMPLE[3]], 10.0, (99,))
    assert found["mean_ttft_ms"] == found["p99_e2el_ms"] == found["request_throughput"] == 0
    assert found["failed"] == 1


def test_goodput_counts_what_meets_every_goal() -> None:
    assert Goodput.parse(["ttft:200", "tpot:50.5"]).most_ms == {"ttft": 200, "tpot": 50.5}
    slow, single, _, _ = EXAMPLE
    assert Goodput({"tpot": 500.001}).met(slow) and not Goodput({"tpot": 499}).met(slow)
    assert Goodput({"tpot": 0}).met(single)  # one token: no time between tokens
    for bad in ("itl:5", "ttft", "ttft:x", "ttft:-1"):
        with pytest.raises(TrafficError, match="goodput"):
            Goodput.parse([bad])


def test_jain_index() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1)
    assert jain([3.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0]) == pytest.approx(9 / 10)
    assert jain([]) == jain([0.0]) == 0


def test_service_is_one_over_the_time_for_a_token() -> None:
    assert service(EXAMPLE[:2]) == pytest.approx(1 / ((2 / 3 + 0.5) / 2))
    assert service(EXAMPLE[2:]) == pytest.approx(1 / (5 / 3) / 2)  # half of them failed
    # Given up after 10 s of waiting for 5 tokens: at least 2 s a token.
    assert service([record("a", 0, [], UNFINISHED, ended_s=10.0)]) == pytest.approx(0.5)


def test_a_report_holds_everything_for_each_tenant() -> None:
    found = report(EXAMPLE, 7.0)
    assert found["duration"] == 8.0 and found["drain_s"] == pytest.approx(1.0)
    assert set(found["tenants"]) == {"a", "b"} and found["tenants"]["b"][
        "mean_ttft_ms"
    ] == pytest.approx(2000)
    assert found["worst_tenant"] == "b"
    assert found["jain_index"] == pytest.approx(jain([service(EXAMPLE[:2]), service(EXAMPLE[2:])]))
    assert found["reconfiguration_share_of_ttft"] == pytest.approx(0.7 / 3.5)
    assert found["errors"] == {"EngineError: no": 1}
    assert "p95_ttft_ms" in found and "p95_itl_ms" in found["tenants"]["a"]


def test_saturation_is_a_backlog() -> None:
    # One request a second for 20 s, each answered in 2 s: the last ends 2 s after the last arrival.
    steady = [record("a", float(t), [t + 1.0, t + 2.0]) for t in range(20)]
    assert answered_share(steady, 20.0) == pytest.approx(1.0)
    assert not report(steady, 20.0)["saturated"]
    # A server that takes 1.5 s for each, one at a time: a third of the arrivals are still there at
    # the end.
    behind = [record("a", float(t), [1.5 * (t + 1)]) for t in range(20)]
    found = report(behind, 20.0)
    assert found["saturated"] and found["answered_share"] == pytest.approx(
        20 / (20 + 10 - 3.75), rel=0.02
    )
    cut = [
        *steady[:10],
        *(record("a", float(t), [], UNFINISHED, ended_s=25.0) for t in range(10, 20)),
    ]
    found = report(cut, 20.0)
    assert found["saturated"] and found["failed"] == 10
    assert found["mean_e2el_ms"] == pytest.approx(2000)
    assert found["mean_e2el_at_least_ms"] == pytest.approx(
        (10 * 2 + sum(25 - t for t in range(10, 20))) / 20 * 1e3
    )


class Fake:
    """Answers when it is told to."""

    name = "fake"

    def __init__(self, answer: Callable[[Call], AsyncGenerator[Piece]]):
        self.generate = answer
        self.order: list[int] = []

    async def about(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None: ...


def test_requests_are_sent_whatever_became_of_the_others() -> None:
    seen: list[int] = []
    cancelled: list[int] = []

    async def stuck(call: Call) -> AsyncGenerator[Piece]:
        seen.append(call.number)
        try:
            if call.number == 1:
                raise ValueError("this one fails")
            yield Piece(1, 0.25)
            if call.number == 2:
                await asyncio.sleep(60)
            yield Piece(2, 0.25, 7 if call.number == 3 else None)
        except (asyncio.CancelledError, GeneratorExit):
            cancelled.append(call.number)
            raise

    calls = tuple(Call(n, "a", 0.02 * n, (1,), 3) for n in range(5))
    records = asyncio.run(run_trace(Fake(stuck), Trace(calls, 0.1), drain_s=2.0))
    assert seen == [0, 1, 2, 3, 4] and cancelled == [2]
    assert [r.error for r in records] == [
        None,
        "ValueError: this one fails",
        UNFINISHED,
        None,
        None,
    ]
    assert [r.num_tokens for r in records] == [3, 0, 1, 7, 3]
    assert records[0].reconfiguration_s == 0.5
    for r in records:
        assert r.sent_s >= r.call.at_s and r.ended_s >= r.sent_s


def test_an_answer_without_tokens_is_none() -> None:
    async def nothing(call: Call) -> AsyncGenerator[Piece]:
        yield Piece(0)

    records = asyncio.run(run_trace(Fake(nothing), Trace((Call(0, "a", 0.0, (1,), 3),), 0.1), 1.0))
    assert records[0].error == "an answer without tokens"


def test_capacity_keeps_so_many_under_way() -> None:
    running, most = 0, 0

    async def answer(call: Call) -> AsyncGenerator[Piece]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            for _ in range(call.max_new_tokens):
                await asyncio.sleep(0.002)
                yield Piece(1)
        finally:
            running -= 1

    calls = list(make_trace({"a": 9}, Load(output_len=3), 1.0, num_requests=5).calls)
    assert asyncio.run(capacity(Fake(answer), calls, 4, 0.3)) > 0
    assert most == 4 and running == 0
    asyncio.run(warm_up(Fake(answer), calls))
    assert most == 5 and running == 0


def test_capacity_tells_errors_and_stalls() -> None:
    async def fails(call: Call) -> AsyncGenerator[Piece]:
        raise ValueError("broken")
        yield Piece(1)

    async def stalls(call: Call) -> AsyncGenerator[Piece]:
        await asyncio.sleep(60)
        yield Piece(1)

    calls = [Call(0, "a", 0.0, (1,), 3)]
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(capacity(Fake(fails), calls, 2, 0.1))
    assert asyncio.run(capacity(Fake(stalls), calls, 2, 0.05)) == 0
