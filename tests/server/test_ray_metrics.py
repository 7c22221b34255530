"""What Ray Serve's replicas count: through the ingress, and on Ray's own endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.cluster import Cluster, cluster, two_replicas

pytest.importorskip("ray.serve", reason="needs the extra ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TENANTS = ("ana", "bob", "ids", "new")
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def ray(four_tenants: Path) -> Iterator[Cluster]:
    with cluster() as found:
        found.apply(two_replicas(four_tenants))
        found.settle(2)
        yield found


def scrape(url: str) -> Samples:
    """(name, tenant) -> value, summed over the other labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(httpx2.get(url, timeout=30).text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("model_name", "")
            found[key] = found.get(key, 0.0) + sample.value
    return found


def test_the_ingress_tells_of_all_replicas(ray: Cluster) -> None:
    url = ray.url + "/metrics"
    before = scrape(url)
    bodies = [{"model": t, "prompt": [3, 4], "max_tokens": 5, "ignore_eos": True} for t in TENANTS]
    with ray.sending(bodies * 3) as replies:
        pass
    assert all(r.result().status == 200 for r in replies)
    time.sleep(1)  # what was asked is kept for half a second
    after = scrape(url)

    def grown(name: str, tenant: str) -> float:
        return after[name, tenant] - before.get((name, tenant), 0.0)

    for tenant in TENANTS:
        assert grown("moetel_generation_tokens_total", tenant) == 15
        assert grown("moetel_prompt_tokens_total", tenant) == 6
        assert grown("moetel_request_success_total", tenant) == 3
        assert grown("moetel_routed_requests_total", tenant) == 3
        assert grown("moetel_time_to_first_token_seconds_count", tenant) == 3
        assert after["moetel_num_requests_running", tenant] == 0
    assert after["moetel_replicas", ""] == 2
    assert after["moetel_replica_losses_total", ""] == 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after["vllm:" + name, ""] == 0
    page = httpx2.get(ray.url + "/status.json", timeout=30).json()
    assert page["state"] == "ready" and page["memory"]["pool"] > 0
    assert {t["name"]: t["requests"] for t in page["tenants"]} == dict.fromkeys(TENANTS, 3)


def test_loads_are_those_of_now(ray: Cluster) -> None:
    body = {"model": "bob", "prompt": [3, 4], "max_tokens": 800, "ignore_eos": True}
    with ray.sending([body] * 3):
        ray.wait_until(lambda: scrape(ray.url + "/metrics")["vllm:num_requests_running", ""] == 3)
        found = httpx2.get(ray.url + "/load", timeout=30).json()
        assert found["running"] == 3 and found["tenants"]["bob"]["running"] == 3
        assert scrape(ray.url + "/metrics")["vllm:kv_cache_usage_perc", ""] > 0


def test_rays_endpoint_has_the_same_names(ray: Cluster) -> None:
    """Ray collects every few seconds."""
    ingress = scrape(ray.url + "/metrics")
    name = "moetel_generation_tokens_total"
    expected = {t: ingress[name, t] for t in TENANTS}

    def there() -> bool:
        found = scrape(ray.metrics_url)
        return {t: found.get(("ray_" + name, t), 0.0) for t in TENANTS} == expected

    ray.wait_until(there, 60)
    found = scrape(ray.metrics_url)
    for tenant in TENANTS:
        assert found["ray_moetel_num_requests_running", tenant] == 0
        assert ("ray_moetel_num_requests_waiting", tenant) in found
    assert ("ray_vllm_num_requests_waiting", "") in found
