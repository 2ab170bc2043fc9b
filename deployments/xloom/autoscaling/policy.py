"""How many replicas are wanted, from queue depth and KV-page occupancy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CALM = 0.5  # share of a target that the remaining replicas must stay under after one is taken away


@dataclass(frozen=True)
class Signals:
    """What one replica reported last."""

    queue_depth: float  # requests waiting in its engine
    kv_occupancy: float  # share of KV pages in use, 0 to 1
    running: float = 0.0


@dataclass(frozen=True)
class Targets:
    """What a replica should carry at most."""

    queue_depth: float  # waiting requests a replica
    kv_occupancy: float  # share of KV pages


def decide(
    signals: Sequence[Signals],
    *,
    current: int,
    target: int,
    lowest: int,
    highest: int,
    targets: Targets,
    pending: float = 0.0,
) -> int:
    """The number of replicas wanted, within `lowest` and `highest`.

    `current` run and `target` were asked for last; `pending` requests wait for a first replica. While a change is
    under way (current, target and the number of reports differ) the target stands: deciding on the figures of
    half a change overshoots. Either signal over its target adds replicas in proportion; one is taken away only when
    the others would then carry less than half of both targets.
    """
    if current == 0 and target == 0:
        return min(highest, max(lowest, 1)) if pending > 0 else lowest
    if not (current == target == len(signals)):
        return _bounded(target, lowest, highest)
    queue = sum(each.queue_depth for each in signals) / current
    pages = sum(each.kv_occupancy for each in signals) / current
    # A full replica beside empty ones is placement's affair, but one whose pages are full and that has a queue
    # is out of room whatever the mean says.
    stuck = any(each.kv_occupancy > targets.kv_occupancy and each.queue_depth > targets.queue_depth for each in signals)
    pressure = max(queue / targets.queue_depth, pages / targets.kv_occupancy)
    if pressure > 1 or stuck:
        return _bounded(max(current + 1, math.ceil(current * min(pressure, 2.0))), lowest, highest)
    if current == 1:
        busy = any(each.running or each.queue_depth for each in signals) or pending > 0
        return _bounded(1 if busy else 0, lowest, highest)
    rest = current / (current - 1)
    calm = queue * rest < CALM * targets.queue_depth and pages * rest < CALM * targets.kv_occupancy
    return _bounded(current - 1 if calm else current, lowest, highest)


def _bounded(wanted: int, lowest: int, highest: int) -> int:
    return max(lowest, min(highest, wanted))


class QueueAndPagesPolicy:
    """`decide` behind Serve's policy hook: Serve makes one in its controller and calls it each period.

    Reads `AutoscalingContext.raw_metrics` (ray.serve.config, Ray 2.60): per metric and replica a series of
    time-stamped values, the last of which is the newest. Serve applies bounds and delays to the answer.
    """

    def __init__(self, target_queue_depth: float, target_kv_occupancy: float) -> None:
        self._targets = Targets(target_queue_depth, target_kv_occupancy)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, and no state to keep."""
        wanted = decide(
            signals_of(context.raw_metrics or {}, context.running_replicas),
            current=context.current_num_replicas,
            target=context.target_num_replicas,
            lowest=context.capacity_adjusted_min_replicas,
            highest=context.capacity_adjusted_max_replicas,
            targets=self._targets,
            pending=float(context.total_num_requests or 0),
        )
        return wanted, {}


def signals_of(metrics: dict[str, dict[Any, Any]], running: Sequence[Any]) -> list[Signals]:
    """The newest figures of each running replica that has reported."""

    def last(name: str, replica: Any) -> float | None:
        series = metrics.get(name, {}).get(replica)
        return float(series[-1].value) if series else None

    found = []
    for replica in running:
        queue, pages = last("queue_depth", replica), last("kv_occupancy", replica)
        if queue is not None and pages is not None:
            found.append(Signals(queue, pages, last("running", replica) or 0.0))
    return found
