"""A process that was stopped is killed within the limit; one that only sleeps, or whose machine slept, is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from xloom.watchdog import Stopped

PARENT = """
import subprocess, sys, time
from xloom.watchdog import Watchdog
watchdog = Watchdog(float(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, watchdog._process.pid, flush=True)
time.sleep(600)
"""


class Family:
    """A process with a watchdog, and its child."""

    def __init__(self, limit_s: float) -> None:
        command = [sys.executable, "-c", PARENT, str(limit_s)]
        self.parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.parent.stdout is not None
        child, watchdog = map(int, self.parent.stdout.readline().split())
        self.child, self.watchdog = psutil.Process(child), psutil.Process(watchdog)

    def end(self) -> None:
        for process in (self.child, self.watchdog, self.parent):
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()
        self.parent.communicate()


@pytest.fixture
def family() -> Iterator[Family]:
    made = Family(1.0)
    yield made
    made.end()


def gone(process: psutil.Process) -> bool:
    """Whether it has ended within ten seconds; a child that nobody waits for is a zombie then."""
    for _ in range(1000):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        try:
            process.wait(0.01)
        except psutil.TimeoutExpired:
            continue
    return False


def test_a_stopped_process_is_killed(family: Family) -> None:
    os.kill(family.parent.pid, signal.SIGSTOP)
    assert family.parent.wait(10) == -signal.SIGKILL
    assert family.child.is_running()
    assert gone(family.watchdog)


def test_a_stopped_child_is_killed_and_its_parent_goes_on(family: Family) -> None:
    os.kill(family.child.pid, signal.SIGSTOP)
    assert gone(family.child)
    assert family.parent.poll() is None
    assert family.watchdog.is_running()


def test_what_is_stopped_is_killed_though_its_parent_has_ended(family: Family) -> None:
    os.kill(family.child.pid, signal.SIGSTOP)
    os.kill(family.parent.pid, signal.SIGSTOP)
    family.parent.wait(10)
    assert gone(family.child)
    assert gone(family.watchdog)


def test_it_ends_with_the_process_it_watches(family: Family) -> None:
    family.parent.kill()
    assert gone(family.watchdog)


@pytest.fixture
def stopped() -> Iterator[psutil.Process]:
    process = psutil.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        pass
    yield process
    process.kill()
    process.wait()


def test_time_in_which_nobody_ran_does_not_count(stopped: psutil.Process) -> None:
    look = Stopped(10.0).look
    assert look(0.0, [stopped]) == []
    assert look(9.0, [stopped]) == []
    assert look(3600.0, [stopped], late_s=3590.5) == []
    assert look(3601.0, [stopped]) == [stopped]


def test_one_that_goes_on_in_time_begins_anew(stopped: psutil.Process) -> None:
    look = Stopped(10.0).look
    assert look(0.0, [stopped]) == []
    stopped.resume()
    while stopped.status() == psutil.STATUS_STOPPED:
        pass
    assert look(9.0, [stopped]) == []
    stopped.suspend()
    while stopped.status() != psutil.STATUS_STOPPED:
        pass
    assert look(11.0, [stopped]) == []
    assert look(21.0, [stopped]) == [stopped]
