"""vLLM's own metrics, each from where it is known: at a router's /metrics, and through Ray's exporter as `ray_vllm_*`.

The router knows what happens to requests, a replica what its scheduler does; the label `room` says which it is.
vLLM's wrappers call Ray for every token: here the metrics they make are series of our recorder.

Relies on vLLM 0.32: `vllm.v1.metrics.ray_wrappers` (`RayPrometheusStatLogger`, `_get_replica_id`, its label `ReplicaId`
and the characters it allows); the attributes and metrics of `vllm.v1.metrics.loggers.PrometheusStatLogger` named below,
which it makes by keyword with `_gauge_cls`, `_counter_cls` and `_histogram_cls`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger, _get_replica_id

from xloom.observability.recorder import RECORDER, Series
from xloom.observability.table import Kind, Metric

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

_UNKNOWN_TO_ROUTERS = ("histogram_iteration_tokens",)  # of whole engine steps
# What a router's /metrics leaves out: it is not known there, or of things that xloom does not have.
LEFT_OUT = frozenset(
    {
        "vllm:num_requests_waiting_by_reason",
        "vllm:engine_sleep_state",
        "vllm:external_prefix_cache_queries",
        "vllm:external_prefix_cache_hits",
        "vllm:mm_cache_queries",
        "vllm:mm_cache_hits",
        "vllm:admission_rejections",
        "vllm:iteration_tokens_total",
        "vllm:lora_requests_info",  # and vllm:cache_config_info, which `log_engine_initialized` would make
    }
)


class _Figure:
    """Stands where `PrometheusStatLogger` makes a metric of prometheus_client."""

    def __init__(
        self,
        kind: Kind,
        component: str,
        name: str,
        documentation: str = "",
        labelnames: Any = (),
        buckets: Any = (),
        multiprocess_mode: str = "",  # of prometheus_client's files; Ray tells processes apart by itself
    ) -> None:
        self._names = tuple(labelnames)
        self._own = (_get_replica_id() or "", component)
        plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
        labels = (*self._names, "ReplicaId", "room")
        self._metric = Metric(plain, kind, component, documentation, labels, tuple(buckets))

    def labels(self, *values: object, **named: object) -> Series:
        """The series with these label values; it has the methods of a prometheus_client child that are called."""
        given = values or tuple([named[name] for name in self._names])
        return RECORDER.by_values(self._metric, (*map(str, given), *self._own))


class _Nothing:
    def observe(self, value: float) -> None:
        pass


def _scraped(kind: Any, name: str, **options: Any) -> Any:
    """A metric of prometheus_client; one that is left out is in no registry."""
    return kind(name, registry=None if name in LEFT_OUT else REGISTRY, **options)


class ScrapedStatLogger(PrometheusStatLogger):
    """A router's, at its /metrics: requests, and the replicas' reports."""

    _gauge_cls = partial(_scraped, Gauge)
    _counter_cls = partial(_scraped, Counter)
    _histogram_cls = partial(_scraped, Histogram)

    def log_engine_initialized(self) -> None:
        """There are no pages here."""


class RequestStatLogger(RayPrometheusStatLogger):
    """A router's, through Ray: requests, their tokens and latencies."""

    _gauge_cls = partial(_Figure, "gauge", "router")
    _counter_cls = partial(_Figure, "counter", "router")
    _histogram_cls = partial(_Figure, "histogram", "router")

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        for name in _UNKNOWN_TO_ROUTERS:
            setattr(self, name, dict.fromkeys(getattr(self, name), _Nothing()))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        super().record(None, iteration_stats, None, engine_idx)

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """There is no engine here."""

    def log_engine_initialized(self) -> None:
        """There are no pages here."""


class SchedulerStatLogger(RayPrometheusStatLogger):
    """A replica's: what its scheduler and its prefix cache do."""

    _gauge_cls = partial(_Figure, "gauge", "replica")
    _counter_cls = partial(_Figure, "counter", "replica")
    _histogram_cls = partial(_Figure, "histogram", "replica")

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self.gauge_lora_info = None  # a label that lists adapters: a series for each mix of them

    def began(self, outputs: EngineCoreOutputs) -> None:
        """Of the requests whose first tokens came in a step: seconds in the queue, and from there to those tokens.

        Times of one process, as vLLM's own `IterationStats` takes them; one that is preempted counts once.
        """
        for output in outputs.outputs:
            at = {event.type.name: event.timestamp for event in reversed(output.events or ())}  # the first of each
            if {"QUEUED", "SCHEDULED"} <= set(at) and output.new_token_ids:
                self.histogram_queue_time_request[0].observe(at["SCHEDULED"] - at["QUEUED"])
                self.histogram_prefill_time_request[0].observe(outputs.timestamp - at["SCHEDULED"])

    def take(self, scheduler_stats: SchedulerStats) -> None:
        """The figures of one engine step."""
        self.record(scheduler_stats, None)
