"""What a running deployment keeps from others: its keys, its port, and what is not its business to read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ..served import Served

KEYS = {"XLOOM_API_KEY", "XLOOM_ADMIN_KEY"}


def test_the_keys_are_in_the_environment_of_the_command_alone(server: Served) -> None:
    assert set(psutil.Process(server.process.pid).environ()) >= KEYS
    started = [process for process in server.processes() if process.pid != server.process.pid]
    assert len(started) > 5  # Ray's, the router, a replica, its engine
    for process in started:
        try:
            assert not KEYS & set(process.environ()), process.name()
        except psutil.NoSuchProcess:
            continue


def test_a_second_deployment_on_its_port_is_refused_before_anything_starts(server: Served) -> None:
    command = [str(Path(sys.executable).with_name("xloom")), "serve", "--port", str(server.port)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    assert second.returncode == 2
    assert f"127.0.0.1:{server.port} can't be bound" in second.stderr
    assert "Starting Ray" not in second.stderr
    assert server.http.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("", 404, "source_not_found"),
        (".", 404, "source_not_found"),
        ("local:///tmp", 400, "source_unsupported"),
        ("http://169.254.169.254/latest", 403, "source_not_allowed"),
        ("memory://x/y", 403, "source_not_allowed"),
    ],
)
def test_what_was_not_given_is_not_read(server: Served, source: str, status: int, code: str) -> None:
    answer = server.load("gamma", source)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "gamma" not in server.names()
