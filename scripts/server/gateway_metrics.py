"""Metrics under the names by which the Gateway API inference extension finds them: those of vLLM.

It sends a request to the server that has room, and the request's adapter in memory. Tenants are to
it what LoRA adapters are in vLLM.
Source: kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric


def gateway_metrics(load: dict[str, Any], stats: dict[str, Any]) -> Iterator[Metric]:
    """Of all tenants together, as the extension reads one number of a server. load, stats: as
    `Engine.load` and `Engine.stats` give them."""
    for name, about in (
        ("running", "Requests in the steps of now, of all tenants."),
        ("waiting", "Requests that wait, of all tenants."),
    ):
        yield GaugeMetricFamily(f"vllm:num_requests_{name}", about, load[name])
    room, used = load.get("kv_cache_bytes") or 0, load.get("kv_cache_used_bytes") or 0
    yield GaugeMetricFamily(
        "vllm:kv_cache_usage_perc",
        "Part of the caches' room in use; 1 is all.",
        used / room if room else 0.0,
    )
    ready = sorted(stats.get("ready_tenants", ()))
    waiting = [t for t, n in load["tenants"].items() if n.get("waiting") and t not in ready]
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Tenants that are ready, and others that have requests that wait; the time of now.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    most = stats.get("max_ready_tenants", len(ready))
    info.add_metric([str(most), ",".join(ready), ",".join(sorted(waiting))], time.time())
    yield info
