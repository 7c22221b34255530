"""A replica's metrics on Ray's own endpoint: those of `moetel serve`, by the same names."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from scripts.server.metrics import FromEngine


class ExportedMetrics:
    """Ray adds `ray_` before names, and the labels application, deployment and replica."""

    def __init__(self) -> None:
        self._source = FromEngine()
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}
        self._counted: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def send(self, load: dict[str, Any], stats: dict[str, Any], tenants: tuple[str, ...]) -> None:
        """load, stats: as `Engine.load` and `Engine.stats` give them."""
        self._source.snapshot, self._source.tenants = (load, stats), tenants
        for family in self._source.collect():
            name = family.name.replace(":", "_")  # Ray is about to refuse colons
            for sample in family.samples:
                labels = sample.labels
                if family.type == "gauge":
                    gauge = self._made(self._gauges, metrics.Gauge, name, family, labels)
                    gauge.set(sample.value, tags=labels)
                elif family.type == "counter":
                    key = name, tuple(sorted(labels.items()))
                    more = sample.value - self._counted.get(key, 0.0)
                    self._counted[key] = sample.value
                    if more > 0:
                        counter = self._made(self._counters, metrics.Counter, name, family, labels)
                        counter.inc(more, tags=labels)

    @staticmethod
    def _made(made: dict[str, Any], kind: Any, name: str, family: Any, labels: Any) -> Any:
        if name not in made:
            made[name] = kind(name, description=family.documentation, tag_keys=tuple(labels))
        return made[name]
