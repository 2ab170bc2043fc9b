"""Processes are found by the mark they inherit, and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

from xloom.processes import end_marked, marked

NAME = "XLOOM_TEST_MARK"
# A parent that ends at once and leaves a child, as Ray's agents are left; the child says that it is there.
ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
CHILD = "import time; print('here', flush=True); time.sleep(600)"


def started(value: str, code: str = CHILD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ORPHAN, code]
    made = subprocess.Popen(command, env=os.environ | {NAME: value}, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    assert made.stdout.readline() == "here\n"
    return made


def test_an_orphan_is_found_by_its_mark_and_ended() -> None:
    value = uuid.uuid4().hex
    with started(value) as parent:
        parent.wait()
        assert len(marked(NAME, value)) == 1
        assert marked(NAME, uuid.uuid4().hex) == []
        end_marked(NAME, value, timeout_s=30)
        assert marked(NAME, value) == []


def test_what_ends_by_itself_is_given_the_time() -> None:
    value = uuid.uuid4().hex
    with started(value, "import time; print('here', flush=True); time.sleep(0.2)") as parent:
        began = time.monotonic()
        end_marked(NAME, value, grace_s=60, timeout_s=30)
        assert marked(NAME, value) == []
        assert time.monotonic() - began < 60
        parent.wait()


def test_this_process_is_never_among_them() -> None:
    first = Path("/proc/self/environ").read_text(encoding="utf-8").split("\0")[0]
    name, _, value = first.partition("=")
    assert os.getpid() not in {each.pid for each in marked(name, value)}
