"""What a replica says of its engine, as metrics."""

from __future__ import annotations

from xloom.observability import table
from xloom.observability.recorder import Recorder
from xloom.protocol import EngineStats


class EngineMetrics:
    """The gauges of one replica, set anew with each of its reports."""

    def __init__(self, recorder: Recorder, replica_id: str) -> None:
        self._running = recorder.gauge(table.REPLICA_RUNNING, replica=replica_id)
        self._waiting = recorder.gauge(table.REPLICA_WAITING, replica=replica_id)
        self._pages_used = recorder.gauge(table.KV_PAGES_USED, replica=replica_id)
        self._pages_total = recorder.gauge(table.KV_PAGES_TOTAL, replica=replica_id)
        self._adapters = recorder.gauge(table.ADAPTERS_RESIDENT, replica=replica_id)
        self._preemptions = recorder.counter(table.PREEMPTIONS, replica=replica_id)
        self._preempted = 0  # when it was last told

    def take(self, stats: EngineStats) -> None:
        """The newest figures."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._pages_used.set(stats.kv_pages_used)
        self._pages_total.set(stats.kv_pages_total)
        self._adapters.set(len(stats.adapters))
        self._preemptions.inc(stats.preemptions - self._preempted)
        self._preempted = stats.preemptions
