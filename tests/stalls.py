"""What holds an event loop up: the processor time of each callback, and pauses of a task that wakes all the time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

TICK_S = 0.002


@dataclass
class Stalls:
    """The worst so far, in seconds."""

    busy_s: float = 0.0  # processor time of one callback: a busy machine does not lengthen it
    pause_s: float = 0.0  # from when the task should have run until it did: others' threads count, and other programs
    culprit: str = ""

    def forget(self) -> None:
        """From here on."""
        self.busy_s, self.pause_s, self.culprit = 0.0, 0.0, ""


@asynccontextmanager
async def measured() -> AsyncIterator[Stalls]:
    """The stalls of this thread's event loop (asyncio's own) while the block runs."""
    stalls = Stalls()
    original, thread = asyncio.Handle._run, threading.get_ident()

    def run(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        original(handle)
        if (busy := time.thread_time() - began) > stalls.busy_s and threading.get_ident() == thread:
            stalls.busy_s, stalls.culprit = busy, repr(handle)

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(TICK_S)
            stalls.pause_s = max(stalls.pause_s, time.perf_counter() - began - TICK_S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", run)
        ticking = asyncio.create_task(tick())
        try:
            yield stalls
        finally:
            ticking.cancel()
