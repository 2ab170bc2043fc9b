"""How long the parts of an X-LoRA step take: the scaling pass, classifier and gates, the forward pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch


@dataclass
class StepTimes:
    """Steps with X-LoRA tokens, and the seconds they spent in the model."""

    steps: int = 0
    total: float = 0.0
    scaling: float = 0.0  # of the total
    routing: float = 0.0  # of the total: classifier, and gates handed to the kernels

    def add(self, scaling: float, routing: float, forward: float) -> None:
        """One step."""
        self.steps += 1
        self.total += scaling + routing + forward
        self.scaling += scaling
        self.routing += routing


class Clock(Protocol):
    """Times steps: `start`, then `lap` after the scaling pass, after the routing and after the forward pass.

    A step that fails on its way is left out.
    """

    def start(self) -> None: ...

    def lap(self) -> None: ...

    def take(self) -> StepTimes:
        """The steps that have ended since it was last asked."""

    @property
    def pending(self) -> bool:
        """Whether some steps are over in Python and not yet on the device."""


class HostClock:
    """For a CPU, where a pass is over when it returns. On Apple's Metal: when it has been handed over."""

    pending = False

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._marks: list[float] = []
        self._times = StepTimes()

    def start(self) -> None:
        self._marks = [self._now()]

    def lap(self) -> None:
        self._marks.append(self._now())
        if len(self._marks) == 4:
            begin, scaled, routed, end = self._marks
            self._times.add(scaled - begin, routed - scaled, end - routed)

    def take(self) -> StepTimes:
        taken, self._times = self._times, StepTimes()
        return taken


class DeviceClock:
    """For a GPU: events in the stream of the steps, read once they have passed. Nothing waits for the device."""

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or partial(torch.cuda.Event, enable_timing=True)
        self._free: list[Any] = []
        self._marks: list[Any] = []
        self._running: deque[list[Any]] = deque()
        self._times = StepTimes()

    def start(self) -> None:
        self._read()
        self._free += self._marks  # of a step that failed
        self._marks = []
        self.lap()

    def lap(self) -> None:
        event = self._free.pop() if self._free else self._event()
        event.record()
        self._marks.append(event)
        if len(self._marks) == 4:
            self._running.append(self._marks)
            self._marks = []

    def _read(self) -> None:
        while self._running and self._running[0][3].query():
            marks = self._running.popleft()
            begin, scaled, routed, end = marks
            scaling, routing, forward = (
                first.elapsed_time(then) / 1e3  # milliseconds
                for first, then in ((begin, scaled), (scaled, routed), (routed, end))
            )
            self._times.add(scaling, routing, forward)
            self._free += marks

    def take(self) -> StepTimes:
        self._read()
        taken, self._times = self._times, StepTimes()
        return taken

    @property
    def pending(self) -> bool:
        return bool(self._running)


def clock_for(device: torch.device) -> Clock:
    """The clock that is right for passes on a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()
