"""How many replicas are wanted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xloom.autoscaling.policy import QueueAndPagesPolicy, Signals, Targets, decide

TARGETS = Targets(queue_depth=8, kv_occupancy=0.8)


def wanted(
    *signals: tuple[float, float], target: int | None = None, lowest: int = 1, highest: int = 8, **more: Any
) -> int:
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
    assert decide([], current=0, target=0, lowest=0, highest=4, targets=TARGETS, pending=1) == 1
    assert decide([], current=0, target=0, lowest=0, highest=4, targets=TARGETS) == 0


def test_the_last_replica_goes_when_idle_and_zero_is_allowed() -> None:
    assert wanted((0, 0.0), running=0.0, lowest=0) == 0
    assert wanted((0, 0.0), running=1.0, lowest=0) == 1
    assert wanted((0, 0.0), running=0.0, lowest=1) == 1


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
    policy = QueueAndPagesPolicy(target_queue_depth=8, target_kv_occupancy=0.8)
    assert policy(_context(queue_depth=[0, 0, 20], kv_occupancy=[0, 0, 0.1]))[0] == 2
    assert policy(_context(queue_depth=[20, 20, 0], kv_occupancy=[0.9, 0.9, 0.1]))[0] == 1


def test_the_hook_waits_for_a_replica_that_has_not_reported() -> None:
    assert QueueAndPagesPolicy(8, 0.8)(_context())[0] == 1
