"""Ray Serve applications that change while they answer: more replicas, fewer, others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from common import load_engine
from tests.server.cluster import Answer, Cluster, answer_of, cluster, two_replicas
from tests.server.live import Loop

pytest.importorskip("ray.serve", reason="needs the extra ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TENANTS = ("ana", "bob", "ids", "new")
BODIES: list[dict[str, Any]] = [
    {"model": t, "prompt": [3, 4, 5 + i], "max_tokens": n, "stream": stream, "temperature": 0}
    | {"ignore_eos": True, "return_token_ids": True}
    for i, t in enumerate(TENANTS)
    for stream, n in ((True, 500), (False, 60))
]


@pytest.fixture(scope="module")
def ray(four_tenants: Path) -> Iterator[Cluster]:
    with cluster() as found:
        yield found


@pytest.fixture(scope="module")
def expected(four_tenants: Path) -> list[Answer]:
    """What a server of one process says to `BODIES`."""
    loop = Loop(load_engine(four_tenants, device="cpu", kv_cache_bytes=64 << 20))
    try:
        with loop.serve() as live:
            replies = [live.post("/v1/completions", b | {"stream": False}) for b in BODIES]
            return [answer_of([r.json()]) for r in replies]
    finally:
        loop.close()


def losses(ray: Cluster) -> float:
    lines = httpx2.get(ray.url + "/metrics", timeout=30).text.splitlines()
    return float(next(x for x in lines if x.startswith("moetel_replica_losses_total")).split()[1])


def test_replicas_come_and_go_under_traffic(
    ray: Cluster, four_tenants: Path, expected: list[Answer]
) -> None:
    args = two_replicas(four_tenants, replicas=1)
    ray.apply(args)
    ray.settle(1)
    with ray.traffic(BODIES) as traffic:
        traffic.wait_for_more(3)
        ray.apply(args, num_replicas=2)
        ray.settle(2)
        traffic.wait_for_more(20)
        assert all(sum(sum(n.values()) for n in r["routed"].values()) for r in ray.reports())
        ray.apply(args, num_replicas=1)
        ray.settle(1)
        traffic.wait_for_more(10)
    assert len(traffic.replies) >= 33
    assert [r.answer for _, r in traffic.replies] == [expected[n] for n, _ in traffic.replies]
    assert losses(ray) == 0, "the replica did not wait for its answers"


def test_another_deployment_takes_over_under_traffic(
    ray: Cluster, four_tenants: Path, expected: list[Answer]
) -> None:
    ray.apply(two_replicas(four_tenants))
    ray.settle(2)
    before = {r["pid"] for r in ray.reports()}
    with ray.traffic(BODIES) as traffic:
        traffic.wait_for_more(3)
        ray.apply(two_replicas(four_tenants, max_queue=65))
        ray.wait_until(lambda: not before & {r["pid"] for r in ray.reports()})
        ray.settle(2)
        traffic.wait_for_more(10)
    assert [r.answer for _, r in traffic.replies] == [expected[n] for n, _ in traffic.replies]
    assert losses(ray) == 0


def test_a_flood_gets_429_before_any_status_of_200(ray: Cluster, four_tenants: Path) -> None:
    ray.apply(two_replicas(four_tenants, max_num_seqs=4, max_queue=4))
    ray.settle(2)
    with ray.sending([BODIES[0]] * 40) as replies:
        pass
    found = [r.result() for r in replies]
    refused = [r for r in found if r.status != 200]
    assert {r.status for r in refused} == {429}, [r.text for r in refused if r.status != 429]
    assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
    assert len({r.answer for r in found if r.status == 200}) == 1
    assert len(found) - len(refused) > 4 + 4, "one replica has room for so many"
