"""Figures are counted in memory, checked against the table, and handed over once."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from xloom.observability.recorder import MAX_SERIES, Labels, Recorder
from xloom.observability.table import Metric

REQUESTS = Metric("some_requests_total", "counter", "router", "Requests", ("model", "kind"))
LEVEL = Metric("some_level", "gauge", "router", "Level")
SECONDS = Metric("some_seconds", "histogram", "router", "Time", ("model",), (0.1, 1.0))


class Sink:
    """What was handed over."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Labels, float]] = []
        self.levels: dict[tuple[str, str], float] = {}

    def add(self, metric: Metric, name: str, labels: Labels, amount: float) -> None:
        self.added.append((name, labels, amount))

    def level(self, metric: Metric, name: str, labels: Labels, value: float) -> None:
        self.levels[name, labels.get("le", "")] = value


@pytest.mark.parametrize(
    "labels",
    [{}, {"model": "a"}, {"model": "a", "kind": "base", "more": "1"}, {"model": "a", "more": "1"}],
)
def test_labels_other_than_the_tables_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="has the labels"):
        Recorder().inc(REQUESTS, **labels)


def test_a_metric_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="is a counter, not a gauge"):
        Recorder().set(REQUESTS, 1, model="a", kind="base")


def test_a_series_is_one_however_its_labels_are_ordered() -> None:
    recorder = Recorder()
    recorder.inc(REQUESTS, model="a", kind="base")
    recorder.inc(REQUESTS, 2, kind="base", model="a")
    recorder.inc(REQUESTS, 4, kind="lora", model="b")
    assert recorder.value(REQUESTS, model="a", kind="base") == 3
    assert recorder.value(REQUESTS) == 7


def test_counters_hand_over_what_they_grew() -> None:
    recorder, sink = Recorder(), Sink()
    recorder.inc(REQUESTS, 2, model="a", kind="base")
    recorder.flush(sink)
    recorder.flush(sink)
    recorder.inc(REQUESTS, 0, model="a", kind="lora")  # Ray's counters refuse a zero
    recorder.inc(REQUESTS, 3, model="a", kind="base")
    recorder.flush(sink)
    labels = {"model": "a", "kind": "base"}
    assert sink.added == [(REQUESTS.name, labels, 2), (REQUESTS.name, labels, 3)]


def test_gauges_hand_over_their_newest_value() -> None:
    recorder, sink = Recorder(), Sink()
    level = recorder.gauge(LEVEL)
    recorder.flush(sink)
    assert sink.levels == {}  # nothing is known yet
    level.set(3)
    level.set(0)
    recorder.flush(sink)
    assert sink.levels == {(LEVEL.name, ""): 0}
    sink.levels.clear()
    recorder.flush(sink)
    assert sink.levels == {(LEVEL.name, ""): 0}  # said again: Ray forgets it


def test_histograms_become_prometheus_series() -> None:
    recorder, sink = Recorder(), Sink()
    for value in (0.05, 0.1, 0.5, 7):
        recorder.observe(SECONDS, value, model="a")
    recorder.flush(sink)
    assert sink.levels == {
        ("some_seconds_bucket", "0.1"): 2,
        ("some_seconds_bucket", "1.0"): 3,
        ("some_seconds_bucket", "+Inf"): 4,
        ("some_seconds_count", ""): 4,
        ("some_seconds_sum", ""): 7.65,
    }


def test_endless_label_values_end_up_in_one_series() -> None:
    recorder = Recorder()
    for number in range(MAX_SERIES + 50):
        recorder.inc(REQUESTS, model=f"m{number}", kind="lora")
    assert recorder.value(REQUESTS, model="other", kind="other") == 50
    assert recorder.value(REQUESTS) == MAX_SERIES + 50


def test_nothing_is_lost_between_the_thread_that_counts_and_the_one_that_hands_over() -> None:
    recorder, sink = Recorder(), Sink()
    series = recorder.counter(REQUESTS, model="a", kind="base")
    done = threading.Event()

    def hand_over() -> None:
        while not done.is_set():
            recorder.flush(sink)

    thread = threading.Thread(target=hand_over)
    thread.start()
    for _ in range(20_000):
        series.inc()
    done.set()
    thread.join()
    recorder.flush(sink)
    assert sum(amount for _, _, amount in sink.added) == 20_000


def test_counting_needs_no_ray() -> None:
    """The core has no Ray; an exporter that was started waits for it."""
    code = (
        "import sys; sys.modules['ray'] = None; import time;"
        "from xloom.observability import recorder, table;"
        "recorder.FLUSH_S = 0.01; recorder.RECORDER.start(); recorder.RECORDER.start();"
        "recorder.RECORDER.set(table.ROUTER_WAITING, 2); time.sleep(0.1);"
        "assert recorder.RECORDER.value(table.ROUTER_WAITING) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_metric_that_is_refused_holds_up_no_other() -> None:
    class Picky(Sink):
        def add(self, metric: Metric, name: str, labels: Labels, amount: float) -> None:
            raise RuntimeError(name)

    recorder, sink = Recorder(), Picky()
    recorder.inc(REQUESTS, model="a", kind="base")
    recorder.set(LEVEL, 3)
    with pytest.raises(RuntimeError, match="some_requests_total"):
        recorder.flush(sink)
    assert sink.levels == {(LEVEL.name, ""): 3}
