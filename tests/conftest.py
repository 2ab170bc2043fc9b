"""Settings every test shares: nothing is fetched from the model hub, and Ctrl-C ends what tests start."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts tests in the background has them ignore Ctrl-C, and with them all they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests that run beside each other have a core each: two engines whose threads wait for each other on the same cores
# take several times as long as one after the other.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
