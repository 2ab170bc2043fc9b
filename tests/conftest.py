"""Settings every test shares: nothing is fetched from the model hub, and Ctrl-C ends what tests start."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts tests in the background has them ignore Ctrl-C, and with them all they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
