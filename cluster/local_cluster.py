#!/usr/bin/env python3
"""A Ray cluster of several nodes on this one machine, with a deployment on it, until Ctrl-C: `make cluster`.

For trying what a cluster does: placement, the loss of a node, `serve deploy`, `ray job submit`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from xloom.processes import end_marked, marked

PROGRAMS = Path(sys.executable).parent
FIRST_WORKER_PORT = 21000  # each node has a range of its own from here; the system gives out none of these by itself
WORKER_PORTS = 400
COMMAND_TIMEOUT_S = 400
EXIT_TIMEOUT_S = 10.0

console = Console(stderr=True)


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class LocalCluster:
    """Raylets on this machine, with ports, folder and token of their own; in a `with` block they end with it."""

    def __init__(self, nodes: int = 2, cpus: int = 2, **environment: str) -> None:
        self._nodes, self._cpus = nodes, cpus
        self.folder = Path(tempfile.mkdtemp(prefix="xl-", dir="/tmp"))  # sockets need a short path
        self._token = secrets.token_hex(32)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            # The router has no GPU, and vLLM in it must still recognise the platform.
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # Ray runs its workers at nice 15, and the engines with them.
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        }
        self._gcs, self._dashboard_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self._gcs}"
        self.dashboard = f"http://127.0.0.1:{self._dashboard_port}"

    def __enter__(self) -> LocalCluster:
        try:
            head = ["--head", "--port", self._gcs, "--dashboard-port", self._dashboard_port]
            self._start(0, *head, "--temp-dir", self.folder)
            for number in range(1, self._nodes):
                self._start(number, "--address", self.address)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, number: int, *options: Any) -> None:
        first = FIRST_WORKER_PORT + number * WORKER_PORTS
        ports = ["--min-worker-port", first, "--max-worker-port", first + WORKER_PORTS - 1]
        agents = ["--dashboard-agent-listen-port", free_port(), "--ray-client-server-port", free_port()]
        own = ["--node-ip-address", "127.0.0.1", "--num-cpus", self._cpus, "--disable-usage-stats"]
        self.run("ray", "start", *own, *agents, *ports, *options)

    def run(self, program: str, *arguments: Any) -> str:
        """Run a program of this environment on the cluster; returns what it printed. Raises `RuntimeError` with it."""
        done = subprocess.run(
            [str(PROGRAMS / program), *map(str, arguments)],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def deploy(self, settings: Path) -> str:
        """Deploy a settings file as a job; returns what it said."""
        job = ["--working-dir", Path(__file__).parent, "--", sys.executable, "deploy.py", settings]
        return self.run("ray", "job", "submit", "--address", self.dashboard, *job)

    def processes(self) -> list[psutil.Process]:
        """All that it started: they inherit its token."""
        return marked("RAY_AUTH_TOKEN", self._token)

    def stop(self) -> None:
        """End all of it."""
        end_marked("RAY_AUTH_TOKEN", self._token, timeout_s=EXIT_TIMEOUT_S)
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python cluster/local_cluster.py",
        description=__doc__,
        epilog="example: python cluster/local_cluster.py cluster/local.yaml --nodes 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(__file__).with_name("local.yaml")
    parser.add_argument("settings", nargs="?", type=Path, default=default, metavar="SETTINGS", help="(%(default)s)")
    parser.add_argument("--nodes", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of each node (this machine's)")
    options = parser.parse_args()
    names = ("XLOOM_API_KEY", "XLOOM_ADMIN_KEY")
    keys = {name: os.environ.get(name) or secrets.token_urlsafe(32) for name in names}
    cluster = LocalCluster(options.nodes, options.cpus, **keys)
    with console.status(f"Starting {options.nodes} nodes") as status, cluster as made:
        status.update("Deploying")
        try:
            said = made.deploy(options.settings.resolve())
        except RuntimeError as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            return 2
        status.stop()
        served = [line for line in said.splitlines() if line.startswith("Serving ")][-1]
        token = made.folder / "token"
        for file, secret in {"token": made.environment["RAY_AUTH_TOKEN"], **keys}.items():
            (made.folder / file).touch(mode=0o600)
            (made.folder / file).write_text(secret, encoding="utf-8")
        lines = (
            served,
            f"Ray is at {made.address}, its dashboard at {made.dashboard}. For commands in another shell:",
            f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}",
            f"export {' '.join(f'{name}=$(cat {made.folder / name})' for name in names)}",
            "Ctrl-C ends it.",
        )
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
        status.update("Stopping")
    return 0


if __name__ == "__main__":
    sys.exit(main())
