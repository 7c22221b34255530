"""Prometheus metrics: vLLM's suffixes, units and buckets with the prefix `moetel_`; `model_name` is
the tenant.

Counts are the engine's own, read when somebody asks; durations are observed as requests go on.
Labels are tenants and a few fixed words, so their number is bounded by the store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from scripts.server.gateway_metrics import gateway_metrics

PREFIX = "moetel_"

# vLLM's, in seconds.
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

KINDS = {
    "pool": "pool_bytes",
    "residual": "residual_bytes",
    "non_expert": "non_expert_bytes",
    "kv": "kv_cache_used_bytes",
}
"""Label of `device_bytes`, and the engine's name for it."""

LEVELS = ("device", "host", "disk")


def residency(stats: dict[str, Any], tenant: str) -> str:
    """Where a tenant's non-expert weights are now."""
    if tenant in stats.get("ready_tenants", ()):
        return "device"
    # On CUDA, tenants that are not ready lie in the host's memory; elsewhere they are read from the
    # store again.
    return "host" if str(stats.get("device", "")).startswith("cuda") else "disk"


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine = FromEngine()
        self.registry.register(self._engine)
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN,
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between an answer's tokens.", BETWEEN_TOKENS
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", REQUEST
        )
        self.queued = self._histogram(
            "request_queue_time_seconds",
            "From the engine taking a request to the first step that read of it.",
            REQUEST,
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From that step to the first token.", REQUEST
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", REQUEST
        )

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            PREFIX + name, about, ("model_name",), buckets=buckets, registry=self.registry
        )

    def forget(self, tenant: str) -> None:
        """Drop the histograms of a tenant that is gone."""
        for histogram in (
            self.first_token,
            self.between_tokens,
            self.whole,
            self.queued,
            self.prefill,
            self.decode,
        ):
            with suppress(KeyError):  # it may have answered nothing
                histogram.remove(tenant)

    def render(
        self,
        snapshot: tuple[dict[str, Any], dict[str, Any]] | None,
        tenants: Sequence[str],
        unavailable: Collection[str] = (),
        changes: tuple[int, int] = (0, 0),
    ) -> bytes:
        """As Prometheus reads it. snapshot: the engine's load and statistics, see
        `Service.snapshot`.

        unavailable: those of the tenants that cannot be asked. changes: of the store, that were
            taken and that could not be.
        """
        self._engine.changes = changes
        self._engine.snapshot, self._engine.tenants, self._engine.unavailable = (
            snapshot,
            tenants,
            unavailable,
        )
        return generate_latest(self.registry)


class FromEngine(Collector):
    """What the engine counts itself."""

    snapshot: tuple[dict[str, Any], dict[str, Any]] | None = None
    tenants: Sequence[str] = ()
    unavailable: Collection[str] = ()
    changes: tuple[int, int] = (0, 0)

    def describe(self) -> list[Metric]:
        return []  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        taken = CounterMetricFamily(
            PREFIX + "store_changes",
            "Changes of the store by others; taken: true, or false where what was there is served.",
            labels=["taken"],
        )
        for label, count in zip(("true", "false"), self.changes, strict=True):
            taken.add_metric([label], count)
        yield taken
        if self.snapshot is not None:
            load, stats = self.snapshot
            yield from self._gauges(load, stats)
            yield from self._counters(stats)
            yield from gateway_metrics(load, stats)

    def _gauges(self, load: dict[str, Any], stats: dict[str, Any]) -> Iterator[Metric]:
        for name, about in (
            ("running", "Requests in the steps of now."),
            ("waiting", "Requests that wait."),
        ):
            gauge = GaugeMetricFamily(f"{PREFIX}num_requests_{name}", about, labels=["model_name"])
            for tenant in self.tenants:
                gauge.add_metric([tenant], load["tenants"].get(tenant, {}).get(name, 0))
            yield gauge
        room = load.get("kv_cache_bytes") or 0
        used = load.get("kv_cache_used_bytes") or 0
        yield GaugeMetricFamily(
            f"{PREFIX}kv_cache_usage_perc",
            "Part of the caches' room in use; 1 is all.",
            used / room if room else 0.0,
        )
        where = GaugeMetricFamily(
            f"{PREFIX}tenant_resident",
            "1 where the tenant's non-expert weights are.",
            labels=["model_name", "level"],
        )
        for tenant in self.tenants:
            level = residency(stats, tenant)
            for each in LEVELS:
                where.add_metric([tenant, each], float(each == level))
        yield where
        asked = GaugeMetricFamily(
            f"{PREFIX}tenant_available",
            "0 if the tenant's files are damaged, else 1.",
            labels=["model_name"],
        )
        for tenant in self.tenants:
            asked.add_metric([tenant], float(tenant not in self.unavailable))
        yield asked
        held = GaugeMetricFamily(
            f"{PREFIX}device_bytes", "Bytes held on the device.", labels=["kind"]
        )
        for kind, name in KINDS.items():
            held.add_metric([kind], float(stats.get(name) or load.get(name) or 0))
        yield held

    def _counters(self, stats: dict[str, Any]) -> Iterator[Metric]:
        tenants: dict[str, dict[str, Any]] = stats.get("tenants", {})
        for name, about, key in (
            ("prompt_tokens", "Tokens of prompts read.", "prompt_tokens"),
            (
                "prefix_cache_queries",
                "Tokens of prompts that were looked for in the prefix cache.",
                "prefix_cache_queries",
            ),
            (
                "prefix_cache_hits",
                "Tokens of prompts that were found there, and not computed again.",
                "prefix_cache_hits",
            ),
            ("generation_tokens", "Tokens of answers.", "generation_tokens"),
            ("expert_hits", "Expert look-ups that a resident copy served.", "hits"),
            ("expert_misses", "Expert look-ups that needed the tenant's own expert.", "misses"),
            (
                "preemptions",
                "Requests that gave their caches up and were computed again.",
                "preemptions",
            ),
            (
                "flood_steps",
                "Steps in which the tenant was held to its share, as it flooded the device.",
                "flood_steps",
            ),
        ):
            counter = CounterMetricFamily(PREFIX + name, about, labels=["model_name"])
            for tenant, counts in tenants.items():
                counter.add_metric([tenant], counts.get(key, 0))
            yield counter
        lookups = CounterMetricFamily(
            PREFIX + "expert_lookups", "Expert look-ups.", labels=["model_name"]
        )
        success = CounterMetricFamily(
            PREFIX + "request_success",
            "Answers that ended; finished_reason: stop, length, abort, deadline or error.",
            labels=["model_name", "finished_reason"],
        )
        switches = CounterMetricFamily(
            PREFIX + "reconfigurations",
            "Times that the tenant's weights were made the ones in use.",
            labels=["model_name"],
        )
        seconds = SummaryMetricFamily(
            PREFIX + "reconfiguration_seconds", "How long that took.", labels=["model_name"]
        )
        for tenant, counts in tenants.items():
            lookups.add_metric([tenant], counts.get("hits", 0) + counts.get("misses", 0))
            for reason, number in counts.get("requests", {}).items():
                success.add_metric([tenant, reason], number)
            number = counts.get("reconfigurations", 0)
            switches.add_metric([tenant], number)
            seconds.add_metric([tenant], number, counts.get("reconfiguration_s", 0.0))
        yield from (lookups, success, switches, seconds)
        yield CounterMetricFamily(
            PREFIX + "reconfigured_bytes",
            "Bytes copied to the device for it.",
            stats.get("reconfigured_bytes", 0),
        )
