from __future__ import annotations

import pytest

from xloom.mixtures.clock import DeviceClock, HostClock, StepTimes


class FakeEvent:
    """Stands in for `torch.cuda.Event`: when it was recorded, in milliseconds of a device that lags behind."""

    recorded = 0.0  # the device's clock at the next record
    reached = 0.0  # how far the device has come

    def record(self) -> None:
        FakeEvent.recorded += 1.0
        self.at = FakeEvent.recorded

    def query(self) -> bool:
        return self.at <= FakeEvent.reached

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query()
        assert end.query()
        return end.at - self.at


def test_a_step_is_split_into_scaling_pass_routing_and_forward_pass() -> None:
    clock = HostClock(now=iter([1.0, 3.0, 3.5, 7.0, 10.0, 11.0, 11.5, 12.0]).__next__)
    for _ in range(2):
        clock.start()
        for _ in range(3):
            clock.lap()
    assert clock.take() == StepTimes(steps=2, total=8.0, scaling=3.0, routing=1.0)
    assert clock.take() == StepTimes()


def test_a_step_that_failed_is_left_out() -> None:
    clock = HostClock(now=iter([0.0, 100.0, 200.0, 201.0, 202.0, 203.0]).__next__)
    clock.start()
    clock.lap()
    clock.start()
    for _ in range(3):
        clock.lap()
    assert clock.take() == StepTimes(steps=1, total=3.0, scaling=1.0, routing=1.0)


def test_a_device_is_read_only_as_far_as_it_has_come() -> None:
    FakeEvent.recorded = FakeEvent.reached = 0.0
    made: list[FakeEvent] = []

    def event() -> FakeEvent:
        made.append(FakeEvent())
        return made[-1]

    clock = DeviceClock(event)
    for _ in range(2):
        clock.start()
        for _ in range(3):
            clock.lap()
    assert clock.take() == StepTimes()
    assert clock.pending

    FakeEvent.reached = 4.0  # the first step
    times = clock.take()
    assert (times.steps, times.total, times.scaling) == (1, pytest.approx(3e-3), pytest.approx(1e-3))
    assert clock.pending

    FakeEvent.reached = 8.0
    for _ in range(50):  # a device that keeps up: events are used again
        clock.start()
        for _ in range(3):
            clock.lap()
        FakeEvent.reached = FakeEvent.recorded
    assert clock.take().steps == 51
    assert not clock.pending
    assert len(made) == 8
