"""The replicas' figures as Prometheus gauges, read when scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from xloom.observability import table
from xloom.router.dispatch import Dispatcher

_GAUGES = {  # by field of `EngineStats`
    "running": table.REPLICA_RUNNING,
    "waiting": table.REPLICA_WAITING,
    "kv_pages_used": table.KV_PAGES_USED,
    "kv_pages_total": table.KV_PAGES_TOTAL,
}


class ReplicaCollector(Collector):
    """The replicas' gauges, one series per connected replica, and the requests in this router."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Any]:
        """The figures of the newest reports."""
        links = self._dispatcher.directory.links
        for field, metric in _GAUGES.items():
            gauge = GaugeMetricFamily(metric.name, metric.text, labels=metric.labels)
            for link in links:
                gauge.add_metric([link.info.replica_id], float(getattr(link.stats, field)))
            yield gauge
        in_flight = table.ROUTER_IN_FLIGHT
        yield GaugeMetricFamily(in_flight.name, in_flight.text, value=self._dispatcher.in_flight)


def register(dispatcher: Dispatcher, registry: CollectorRegistry = REGISTRY) -> None:
    """Have the registry that /metrics serves scrape the replicas' figures."""
    registry.register(ReplicaCollector(dispatcher))
