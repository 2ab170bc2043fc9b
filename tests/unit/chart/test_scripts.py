"""The two scripts inside pods, run against a small HTTP server: the test hook's and the one before a pod stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.programs import needs
from tests.unit.chart.rendering import one, pod_templates, render

WGET = needs("wget", package="wget")

Answer = Callable[[dict[str, str], Any], tuple[int, str]]  # headers, body -> status, text


@contextmanager
def endpoint(answer: Answer) -> Iterator[int]:
    """A server that answers every request so; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, text = answer(dict(self.headers), body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port: int, timeout_s: str = "10", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the test hook's container command."""
    container = one(render({}), "Pod")["spec"]["containers"][0]
    _, *flags = container["command"]
    given = {"URL": f"http://127.0.0.1:{port}", "MODEL": "base", "TIMEOUT_S": timeout_s, "PATH": os.environ["PATH"]}
    command = [sys.executable, *flags, *container["args"]]
    return subprocess.run(command, env=given | env, capture_output=True, text=True, timeout=30)


def test_the_hook_asks_for_a_token_with_the_key() -> None:
    seen: list[Any] = []

    def answer(headers: dict[str, str], body: Any) -> tuple[int, str]:
        seen.append((headers.get("Authorization"), body))
        return 200, json.dumps({"model": "base", "choices": [{"text": " there"}], "usage": {"completion_tokens": 1}})

    with endpoint(answer) as port:
        result = ask(port, XLOOM_API_KEY="sk-1")
    assert result.returncode == 0, result.stderr
    assert "' there'" in result.stdout
    assert seen == [("Bearer sk-1", {"model": "base", "prompt": "Hello", "max_tokens": 1})]


def test_the_hook_waits_for_an_endpoint_that_is_not_ready() -> None:
    answers = iter([(503, "starting"), (200, json.dumps({"model": "m", "choices": [{"text": "a"}], "usage": {}}))])
    with endpoint(lambda *_: next(answers)) as port:
        assert ask(port).returncode == 0


def test_the_hook_fails_at_once_when_the_key_is_refused() -> None:
    with endpoint(lambda *_: (401, "invalid_api_key")) as port:
        result = ask(port, timeout_s="3600")
    assert result.returncode == 1
    assert "401 invalid_api_key" in result.stderr


def test_the_hook_says_what_it_waited_for() -> None:
    with endpoint(lambda *_: (200, json.dumps({"choices": []}))) as port:
        result = ask(port, timeout_s="0.1")
    assert result.returncode == 1
    assert "no token in time: " in result.stderr


@WGET
@pytest.mark.parametrize(
    ("figures", "asked"),
    [(["3.0", "12.0", "0.0"], 3), (["0.0"], 1), ([], 0)],
    ids=["a router with requests", "an idle router", "no router"],
)
def test_a_pod_goes_once_its_router_has_answered(figures: list[str], asked: int) -> None:
    container = pod_templates(render({}))["worker cpu"]["spec"]["containers"][0]
    shell, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    left = list(figures)

    def answer(*_: Any) -> tuple[int, str]:
        return (200, f"# HELP\nxloom_router_in_flight {left.pop(0)}\n") if left else (404, "")

    with endpoint(answer) as port:
        assert "sleep 5\n" in script
        script = script.replace("sleep 5\n", "").replace("sleep 1\n", "sleep 0.05\n").replace(":8000/", f":{port}/")
        subprocess.run([shell, flag, script], check=True, timeout=30)
    assert len(figures) - len(left) == asked


@WGET
def test_a_pod_waits_no_longer_than_the_drain_timeout() -> None:
    values = {"settings": {"replicas": {"drain_timeout_s": 1}}}
    container = pod_templates(render(values))["worker cpu"]["spec"]["containers"][0]
    shell, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    with endpoint(lambda *_: (200, "xloom_router_in_flight 1.0\n")) as port:
        script = script.replace("sleep 5\n", "").replace(":8000/", f":{port}/")
        subprocess.run([shell, flag, script], check=True, timeout=20)
