"""A process beside another one: kills what was stopped (SIGSTOP) for too long in its family, to be started anew."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

import psutil

PERIOD_S = 1.0
LATE_S = 0.5  # beyond the period: this process was kept from running, and so may the others have been


class Stopped:
    """Since when which processes have been stopped. Those that a debugger holds are another matter."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[psutil.Process, float] = {}

    def look(self, now: float, family: Iterable[psutil.Process], late_s: float = 0.0) -> list[psutil.Process]:
        """Those stopped for the limit, at monotonic time `now`; the last `late_s` seconds do not count."""
        since = {process: began + late_s for process, began in self._since.items()}
        self._since = {process: since.get(process, now) for process in family if _is_stopped(process)}
        return [process for process, began in self._since.items() if now - began >= self._limit_s]


class Watchdog:
    """This process and its descendants, watched by a process of its own: what is stopped can't watch itself."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self.ensure()

    def ensure(self) -> None:
        """Start it if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(os.getpid()), str(self._limit_s)],
                stdin=subprocess.PIPE,  # closed with this process: then it ends
                start_new_session=True,
            )

    def close(self) -> None:
        """Watch no more."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            self._process = None


def watch(pid: int, limit_s: float, period_s: float = PERIOD_S) -> None:
    """Until the process `pid` has ended, and none of its descendants that is left is stopped."""
    root, stopped = psutil.Process(pid), Stopped(limit_s)
    family = {root}
    alive, last = True, time.monotonic()
    while alive or any(_is_stopped(process) for process in family):
        if alive:
            alive = not select.select([sys.stdin], [], [], period_s)[0] and root.is_running()
        else:
            time.sleep(period_s)
        now = time.monotonic()
        late = now - last - period_s
        last = now
        family |= _descendants(root)
        family = {process for process in family if process.is_running() and process.pid != os.getpid()}
        for process in stopped.look(now, family, late if late > LATE_S else 0.0):
            print(f"xloom: process {process.pid} was stopped for {limit_s:g} s: it is killed", file=sys.stderr)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def _descendants(root: psutil.Process) -> set[psutil.Process]:
    try:
        return set(root.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the watched process's affair
    watch(int(sys.argv[1]), float(sys.argv[2]))
