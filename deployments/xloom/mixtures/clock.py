"""How long the parts of an X-LoRA step take: scaling, classifier and gates, the forward pass.

Two kinds of engines are timed. One with a scaling pass laps after it, after the routing, and after the forward pass. One
with scaling sequences computes those in the same forward pass, and laps after handing gates over, after the pass, and
after making new gates: the pass is shared out by rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch


@dataclass
class StepTimes:
    """Steps with X-LoRA tokens, and the seconds they spent in the model."""

    steps: int = 0
    total: float = 0.0
    scaling: float = 0.0  # of the total
    routing: float = 0.0  # of the total: classifier, and gates handed to the kernels

    def add(self, first: float, second: float, third: float, scaling_share: float | None) -> None:
        """One step of three laps; with scaling sequences their share of the pass."""
        self.steps += 1
        self.total += first + second + third
        if scaling_share is None:
            self.scaling += first
            self.routing += second
        else:
            self.scaling += second * scaling_share
            self.routing += first + third


class Clock(Protocol):
    """Times steps: `start`, then three times `lap`. A step that fails on its way is left out."""

    def start(self, scaling_share: float | None = None) -> None:
        """A step begins; with scaling sequences their share of its rows."""

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
        self._share: float | None = None
        self._times = StepTimes()

    def start(self, scaling_share: float | None = None) -> None:
        self._share = scaling_share
        self._marks = [self._now()]

    def lap(self) -> None:
        self._marks.append(self._now())
        if len(self._marks) == 4:
            first, second, third = (then - before for before, then in pairwise(self._marks))
            self._times.add(first, second, third, self._share)

    def take(self) -> StepTimes:
        taken, self._times = self._times, StepTimes()
        return taken


class DeviceClock:
    """For a GPU: events in the stream of the steps, read once they have passed. Nothing waits for the device."""

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event or partial(torch.cuda.Event, enable_timing=True)
        self._free: list[Any] = []
        self._marks: list[Any] = []
        self._share: float | None = None
        self._running: deque[tuple[list[Any], float | None]] = deque()
        self._times = StepTimes()

    def start(self, scaling_share: float | None = None) -> None:
        self._read()
        self._share = scaling_share
        self._free += self._marks  # of a step that failed
        self._marks = []
        self.lap()

    def lap(self) -> None:
        event = self._free.pop() if self._free else self._event()
        event.record()
        self._marks.append(event)
        if len(self._marks) == 4:
            self._running.append((self._marks, self._share))
            self._marks = []

    def _read(self) -> None:
        while self._running and self._running[0][0][3].query():
            marks, share = self._running.popleft()
            first, second, third = (before.elapsed_time(then) / 1e3 for before, then in pairwise(marks))  # milliseconds
            self._times.add(first, second, third, share)
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
