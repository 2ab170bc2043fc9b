"""How many replicas are wanted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xloom.autoscaling.policy import Decision, QueueAndPagesPolicy, Signals, Targets, decide
from xloom.observability import table
from xloom.observability.recorder import Recorder

TARGETS = Targets(queue_depth=8, kv_occupancy=0.8)


def decision(
    *signals: tuple[float, float], target: int | None = None, lowest: int = 1, highest: int = 8, **more: Any
) -> Decision:
    found = [Signals(queue, pages, more.pop("running", 1.0)) for queue, pages in signals]
    current = more.pop("current", len(found))
    return decide(
        found,
        current=current,
        target=current if target is None else target,
        lowest=lowest,
        highest=highest,
        targets=TARGETS,
        **more,
    )


def wanted(*signals: tuple[float, float], **more: Any) -> int:
    return decision(*signals, **more).replicas


def test_a_queue_over_its_target_adds_a_replica() -> None:
    assert wanted((9, 0.1)) == 2


def test_pages_over_their_target_add_a_replica() -> None:
    assert wanted((0, 0.9), (0, 0.8)) == 3


def test_a_long_queue_adds_several_but_at_most_doubles() -> None:
    assert wanted((100, 0.9), (100, 0.9), (100, 0.9)) == 6


def test_within_the_targets_nothing_changes() -> None:
    assert wanted((5, 0.6), (5, 0.6)) == 2


def test_well_under_both_takes_one_away() -> None:
    assert wanted((0, 0.05), (1, 0.1), (0, 0.0)) == 2


def test_one_is_kept_when_the_rest_would_be_half_full_in_either_signal() -> None:
    assert wanted((2.1, 0.0), (2.1, 0.0)) == 2
    assert wanted((0, 0.21), (0, 0.21)) == 2
    assert wanted((1.9, 0.19), (1.9, 0.19)) == 1


def test_one_replica_out_of_room_counts_though_the_mean_is_low() -> None:
    assert wanted((9, 0.95), (0, 0.0), (0, 0.0)) == 4


@pytest.mark.parametrize(("current", "target", "reporting"), [(1, 2, 1), (2, 2, 1), (3, 2, 3), (1, 3, 1)])
def test_a_change_under_way_is_left_to_finish(current: int, target: int, reporting: int) -> None:
    assert wanted(*[(50.0, 1.0)] * reporting, current=current, target=target) == target


def test_bounds_hold() -> None:
    assert wanted((99, 1.0), (99, 1.0), highest=2) == 2
    assert wanted((0, 0), (0, 0), lowest=2) == 2


def test_zero_replicas_wake_for_a_pending_request_only() -> None:
    assert wanted(lowest=0, pending=1) == 1
    assert wanted(lowest=0) == 0


def test_the_last_replica_goes_when_idle_and_zero_is_allowed() -> None:
    assert wanted((0, 0.0), running=0.0, lowest=0) == 0
    assert wanted((0, 0.0), running=1.0, lowest=0) == 1
    assert wanted((0, 0.0), running=0.0, lowest=1) == 1


@pytest.mark.parametrize(
    ("signals", "more", "replicas", "reason"),
    [
        ([(9, 0.1)], {}, 2, "queue"),
        ([(9, 1.0)], {}, 2, "kv_pages"),
        ([(0, 0.9), (0, 0.8)], {}, 3, "kv_pages"),
        ([(9, 0.95), (0, 0.0), (0, 0.0)], {}, 4, "stuck"),
        ([(0, 0.0), (0, 0.0)], {}, 1, "calm"),
        ([(0, 0.0)], {"lowest": 0, "running": 0.0}, 0, "idle"),
        ([], {"lowest": 0}, 0, "idle"),
        ([], {"lowest": 0, "pending": 3}, 1, "pending"),
        ([(5, 0.6), (5, 0.6)], {}, 2, "steady"),
        ([(0, 0.0)], {"lowest": 0}, 1, "steady"),
        ([(50, 1.0)], {"target": 2}, 2, "in_flight"),
        ([(99, 1.0), (99, 1.0)], {"highest": 2}, 2, "bounds"),
        ([(99, 1.0), (99, 1.0)], {"highest": 3}, 3, "queue"),
        ([(0, 0.0), (0, 0.0)], {"lowest": 2}, 2, "bounds"),
        ([(5, 0.6), (5, 0.6), (5, 0.6)], {"highest": 2}, 2, "bounds"),
        ([(50, 1.0)], {"target": 4, "highest": 2}, 2, "bounds"),
        ([], {}, 1, "bounds"),
    ],
)
def test_each_decision_says_why(
    signals: list[tuple[float, float]], more: dict[str, Any], replicas: int, reason: str
) -> None:
    assert decision(*signals, **more) == Decision(replicas, reason)


def _context(**series: list[float]) -> Any:
    metrics = {name: {"r1": [SimpleNamespace(value=value) for value in values]} for name, values in series.items()}
    return SimpleNamespace(
        raw_metrics=metrics,
        running_replicas=["r1"],
        current_num_replicas=1,
        target_num_replicas=1,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        total_num_requests=0,
    )


def test_the_hook_reads_the_newest_value_of_each_series() -> None:
    policy = QueueAndPagesPolicy(target_queue_depth=8, target_kv_occupancy=0.8, recorder=Recorder())
    assert policy(_context(queue_depth=[0, 0, 20], kv_occupancy=[0, 0, 0.1]))[0] == 2
    assert policy(_context(queue_depth=[20, 20, 0], kv_occupancy=[0.9, 0.9, 0.1]))[0] == 1


def test_the_hook_waits_for_a_replica_that_has_not_reported() -> None:
    assert QueueAndPagesPolicy(8, 0.8, Recorder())(_context())[0] == 1


def test_the_hook_counts_a_decision_when_the_number_wanted_changes() -> None:
    recorder = Recorder()
    policy = QueueAndPagesPolicy(8, 0.8, recorder)
    calm, busy = _context(queue_depth=[0], kv_occupancy=[0.2]), _context(queue_depth=[12], kv_occupancy=[0.2])
    for context in (calm, calm, busy, busy, busy, calm):  # Serve asks anew until its delay is over
        policy(context)
    assert recorder.value(table.SCALING_DECISIONS, direction="up", reason="queue") == 1
    assert recorder.value(table.SCALING_DECISIONS, direction="down", reason="withdrawn") == 1
    assert recorder.value(table.SCALING_DECISIONS) == 2


def test_the_hook_shows_what_it_goes_by() -> None:
    recorder = Recorder()
    QueueAndPagesPolicy(8, 0.8, recorder)(_context(queue_depth=[12], kv_occupancy=[0.2]))
    assert recorder.value(table.SCALING_WANTED) == 2
    assert recorder.value(table.SCALING_CURRENT) == 1
    assert recorder.value(table.SCALING_PRESSURE, signal="queue") == 1.5
    assert recorder.value(table.SCALING_PRESSURE, signal="pages") == 0.25
