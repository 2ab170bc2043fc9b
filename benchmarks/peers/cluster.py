"""A local Ray cluster for a peer, up until the process is interrupted."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve


def run_until_interrupted(application: Callable[[dict[str, Any]], serve.Application]) -> None:
    """Serve an application built from the engine arguments in the JSON file named on the command line."""
    options = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    stop = threading.Event()
    folder = tempfile.mkdtemp(prefix="peer-", dir="/tmp")
    try:
        ray.init(
            num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder, _node_ip_address="127.0.0.1"
        )
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": options["port"]},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run(application(options["engine"]), blocking=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
