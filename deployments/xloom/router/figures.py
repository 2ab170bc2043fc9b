"""The replicas' figures as Prometheus gauges, read when scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from xloom.router.dispatch import Dispatcher

_GAUGES = {
    "running": "Requests the replica's engine works on",
    "waiting": "Requests that wait in the replica's engine",
    "kv_pages_used": "KV pages in use",
    "kv_pages_total": "KV pages the engine has",
}


class ReplicaFigures(Collector):
    """Gauges `xloom_replica_*`, one series per connected replica, and `xloom_router_in_flight`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Any]:
        """The figures of the newest reports."""
        links = self._dispatcher.directory.links
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"xloom_replica_{name}", text, labels=["replica"])
            for link in links:
                gauge.add_metric([link.info.replica_id], float(getattr(link.stats, name)))
            yield gauge
        yield GaugeMetricFamily("xloom_router_in_flight", "Requests in this router", value=self._dispatcher.in_flight)


def register(dispatcher: Dispatcher, registry: CollectorRegistry = REGISTRY) -> None:
    """Have the registry that /metrics serves scrape the replicas' figures."""
    registry.register(ReplicaFigures(dispatcher))
