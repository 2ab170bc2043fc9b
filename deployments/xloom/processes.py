"""The processes of one run, found by a mark in the environment they inherit, whoever is their parent by now."""

from __future__ import annotations

import contextlib
import os

import psutil


def marked(name: str, value: str) -> list[psutil.Process]:
    """The living processes with `name=value` in the environment they were started with, this one left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(name) == value:
                found.append(process)
    return found


def end_marked(name: str, value: str, *, grace_s: float = 0.0, timeout_s: float) -> None:
    """Kill those that have not ended within `grace_s`, and wait up to `timeout_s` for them to be gone."""
    if grace_s:
        psutil.wait_procs(marked(name, value), timeout=grace_s)
    for _ in range(2):  # what one of them was just starting is there the second time
        left = marked(name, value)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=timeout_s)
