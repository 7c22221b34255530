"""Replicas on Ray Serve that are killed amid answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common import load_engine
from tests.server.cluster import Answer, Cluster, answer_of, cluster, two_replicas
from tests.server.live import Loop

pytest.importorskip("ray.serve", reason="needs the extra ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TENANTS = ("ana", "bob", "ids", "new")
LONG = {"max_tokens": 400, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def ray(four_tenants: Path) -> Iterator[Cluster]:
    with cluster() as found:
        found.apply(two_replicas(four_tenants))
        yield found


def bodies() -> list[dict[str, Any]]:
    """Greedy and sampled answers of each tenant, streamed and whole."""
    return [
        LONG | {"model": t, "prompt": [3, 4, 5 + i]} | how | {"stream": stream}
        for i, t in enumerate(TENANTS)
        for stream in (True, False)
        for how in ({"temperature": 0}, {"temperature": 0.8, "seed": 7})
    ]


@pytest.fixture(scope="module")
def expected(four_tenants: Path) -> list[Answer]:
    """What a server of one process says to `bodies`."""
    loop = Loop(load_engine(four_tenants, device="cpu", kv_cache_bytes=64 << 20))
    try:
        with loop.serve() as live:
            replies = [live.post("/v1/completions", b | {"stream": False}) for b in bodies()]
            return [answer_of([r.json()]) for r in replies]
    finally:
        loop.close()


def test_a_killed_replica_loses_nothing(ray: Cluster, expected: list[Answer]) -> None:
    """Whichever of the two it is: each is killed once, while it answers."""
    for turn in range(2):
        ray.settle(2)
        with ray.sending(bodies()) as replies:
            victim = sorted(busy(ray), key=lambda r: r["pid"])[turn]
            ray.kill(victim["pid"])
        assert [r.result().answer for r in replies] == expected


def test_when_all_replicas_are_killed_the_next_ones_answer(
    ray: Cluster, expected: list[Answer]
) -> None:
    ray.settle(2)
    with ray.sending(bodies()) as replies:
        for victim in busy(ray):
            ray.kill(victim["pid"])
    assert [r.result().answer for r in replies] == expected


def test_requests_that_come_while_replicas_die_are_answered(
    ray: Cluster, expected: list[Answer]
) -> None:
    """Sent to replicas that are dead already, or die while they are asked."""
    ray.settle(2)
    victim = ray.reports()[0]["pid"]
    with ThreadPoolExecutor(16) as pool:
        replies = []
        for number, body in enumerate(bodies() * 2):
            if number == 8:
                ray.kill(victim)
            replies.append(pool.submit(ray.send, body))
            time.sleep(0.03)
    assert [r.result().answer for r in replies] == expected * 2


def busy(ray: Cluster) -> list[dict[str, Any]]:
    """Reports of the replicas, once all of them are amid answers."""
    ray.wait_until(lambda: all(r["load"]["running"] for r in ray.reports()), 30)
    time.sleep(0.2)  # some tokens are on their way
    found = ray.reports()
    assert all(r["load"]["running"] for r in found), "there was nothing to lose"
    return found
