"""Requests on Ray Serve go where their tenant is ready, counted by the replicas."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.cluster import Cluster, cluster, two_replicas

pytest.importorskip("ray.serve", reason="needs the extra ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TENANTS = ("ana", "bob", "ids", "new")
BODIES: list[dict[str, Any]] = [
    {"model": TENANTS[n * n % 7 % 4], "prompt": [3, 4, n], "max_tokens": 20, "ignore_eos": True}
    for n in range(40)
]
SERVES_OWN = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with cluster() as found:
        yield found


def warm_share(ray: Cluster) -> float:
    """Of 200 requests, three at a time, after 40."""
    with ray.traffic(BODIES, 3) as traffic:
        traffic.wait_for_more(40)
        before = counts(ray)
        traffic.wait_for_more(200)
    found = {warm: n - before[warm] for warm, n in counts(ray).items()}
    assert all(r.status == 200 for _, r in traffic.replies)
    share = found["true"] / sum(found.values())
    logging.getLogger(__name__).info("warm: %.3f of %d", share, sum(found.values()))
    return share


def counts(ray: Cluster) -> dict[str, int]:
    found = {"true": 0, "false": 0}
    for report in ray.reports():
        for numbers in report["routed"].values():
            for warm, number in numbers.items():
                found[warm] += number
    return found


def test_a_tenants_requests_find_it_ready(ray: Cluster, four_tenants: Path) -> None:
    """Each of two replicas has room for two of the four."""
    args = two_replicas(four_tenants, ready_tenants=2)
    ray.apply(args)
    ray.settle(2)
    assert warm_share(ray) >= 0.9
    router = {"request_router_class": SERVES_OWN}
    ray.apply(args, request_router_config=router)
    ray.settle(2)
    assert warm_share(ray) < 0.9, "it is no test of the router"
