"""How many replicas are wanted, from queue depth and KV-page occupancy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from xloom.observability import table
from xloom.observability.recorder import Recorder

CALM = 0.5  # share of a target that the remaining replicas must stay under after one is taken away

WITHDRAWN = "withdrawn"  # a decision's reason in the metrics when it takes back the one before

Reason = Literal["queue", "kv_pages", "stuck", "calm", "idle", "pending", "steady", "in_flight", "bounds"]


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


@dataclass(frozen=True)
class Pressure:
    """The signals' means over replicas, each as a share of its target."""

    queue: float
    pages: float


@dataclass(frozen=True)
class Decision:
    """How many replicas, and why.

    `reason` is one of: queue, kv_pages (that signal is the further over its target), stuck (one replica is over
    both), calm (one fewer would still be far under both), idle (nothing to do, and none need stay), pending
    (requests wait and there is no replica), steady (nothing asks for a change), in_flight (the last change is still
    under way), bounds (the least or most allowed).
    """

    replicas: int
    reason: Reason


def pressure_of(signals: Sequence[Signals], targets: Targets) -> Pressure:
    """How far the replicas are from their targets; nothing without replicas."""
    count = max(1, len(signals))
    return Pressure(
        sum(each.queue_depth for each in signals) / count / targets.queue_depth,
        sum(each.kv_occupancy for each in signals) / count / targets.kv_occupancy,
    )


def decide(
    signals: Sequence[Signals],
    *,
    current: int,
    target: int,
    lowest: int,
    highest: int,
    targets: Targets,
    pending: float = 0.0,
) -> Decision:
    """The number of replicas wanted, within `lowest` and `highest`, and why.

    `current` run and `target` were asked for last; `pending` requests wait for a first replica. While a change is
    under way (current, target and the number of reports differ) the target stands: deciding on the figures of
    half a change overshoots. Either signal over its target adds replicas in proportion; one is taken away only when
    the others would then carry less than half of both targets.
    """
    if current == 0 and target == 0:
        woken = Decision(1, "pending") if pending > 0 else Decision(0, "idle")
        return _bounded(woken, 0, lowest, highest)
    if not (current == target == len(signals)):
        return _bounded(Decision(target, "in_flight"), target, lowest, highest)
    asked = _asked(signals, pressure_of(signals, targets), targets, pending > 0)
    return _bounded(asked, current, lowest, highest)


def _asked(signals: Sequence[Signals], pressure: Pressure, targets: Targets, pending: bool) -> Decision:
    """What the signals of all replicas ask for, whatever is allowed."""
    current = len(signals)
    # A full replica beside empty ones is placement's affair, but one whose pages are full and that has a queue
    # is out of room whatever the mean says.
    stuck = any(each.kv_occupancy > targets.kv_occupancy and each.queue_depth > targets.queue_depth for each in signals)
    highest = max(pressure.queue, pressure.pages)
    if highest > 1 or stuck:
        over: Reason = "queue" if pressure.queue >= pressure.pages else "kv_pages"
        more = max(current + 1, math.ceil(current * min(highest, 2.0)))
        return Decision(more, over if highest > 1 else "stuck")
    if current == 1:
        busy = any(each.running or each.queue_depth for each in signals) or pending
        return Decision(1, "steady") if busy else Decision(0, "idle")
    rest = current / (current - 1)
    calm = pressure.queue * rest < CALM and pressure.pages * rest < CALM
    return Decision(current - 1, "calm") if calm else Decision(current, "steady")


def _bounded(asked: Decision, now: int, lowest: int, highest: int) -> Decision:
    """What is allowed of it. The bounds are the reason where they let nothing of the change through, or force one."""
    allowed = max(lowest, min(highest, asked.replicas))
    same_way = (allowed - now) * (asked.replicas - now) > 0
    return asked if allowed == asked.replicas else Decision(allowed, asked.reason if same_way else "bounds")


class QueueAndPagesPolicy:
    """`decide` behind Serve's policy hook: Serve makes one in its controller and calls it each period.

    Reads `AutoscalingContext.raw_metrics` (ray.serve.config, Ray 2.60): per metric and replica a series of
    time-stamped values, the last of which is the newest. Serve applies bounds and delays to the answer, so a
    decision may be taken back before it is acted on; that is counted too, with the reason WITHDRAWN.
    """

    def __init__(self, target_queue_depth: float, target_kv_occupancy: float, recorder: Recorder | None = None) -> None:
        self._targets = Targets(target_queue_depth, target_kv_occupancy)
        # Imported here: Serve pickles this module by value (AutoscalingPolicy.serialize_policy, ray/serve/config.py,
        # 2.60) with all globals that the class uses, and the recorder is of one process.
        from xloom.observability.recorder import RECORDER

        self._recorder = recorder or RECORDER
        self._wanted: int | None = None  # by the last decision
        if recorder is None:
            RECORDER.start()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, and no state to keep."""
        signals = signals_of(context.raw_metrics or {}, context.running_replicas)
        decision = decide(
            signals,
            current=context.current_num_replicas,
            target=context.target_num_replicas,
            lowest=context.capacity_adjusted_min_replicas,
            highest=context.capacity_adjusted_max_replicas,
            targets=self._targets,
            pending=float(context.total_num_requests or 0),
        )
        self._record(decision, signals, context)
        return decision.replicas, {}

    def _record(self, decision: Decision, signals: Sequence[Signals], context: Any) -> None:
        before = context.target_num_replicas if self._wanted is None else self._wanted
        self._wanted = decision.replicas
        if decision.replicas != before:
            direction = "up" if decision.replicas > before else "down"
            back = decision.replicas == context.target_num_replicas and decision.reason != "in_flight"
            reason = WITHDRAWN if back else decision.reason
            self._recorder.inc(table.SCALING_DECISIONS, direction=direction, reason=reason)
        pressure = pressure_of(signals, self._targets)
        self._recorder.set(table.SCALING_WANTED, decision.replicas)
        self._recorder.set(table.SCALING_CURRENT, context.current_num_replicas)
        self._recorder.set(table.SCALING_PRESSURE, pressure.queue, signal="queue")
        self._recorder.set(table.SCALING_PRESSURE, pressure.pages, signal="pages")


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
