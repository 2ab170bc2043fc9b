"""vLLM's own metrics through Ray's exporter, as `ray_vllm_*`, each from where it is known.

The router knows what happens to requests, a replica what its scheduler does; the label `room` says which it is.
vLLM's wrappers call Ray for every token: here the metrics they make are series of our recorder.

Relies on vLLM 0.32: `vllm.v1.metrics.ray_wrappers` (`RayPrometheusStatLogger`, `_get_replica_id`, its label `ReplicaId`
and the characters it allows) and the attributes of `vllm.v1.metrics.loggers.PrometheusStatLogger` named below.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger, _get_replica_id

from xloom.observability.recorder import RECORDER, Series
from xloom.observability.table import Kind, Metric

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

# Taken from the time a request was scheduled, or from whole engine steps: a router knows neither.
_UNKNOWN_TO_ROUTERS = (
    "histogram_queue_time_request",
    "histogram_prefill_time_request",
    "histogram_inference_time_request",
    "histogram_request_num_preemptions",
    "histogram_iteration_tokens",
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


class RequestStatLogger(RayPrometheusStatLogger):
    """A router's: requests, their tokens and latencies."""

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
