"""The two scripts inside pods, run: the test hook's against a small HTTP server, and the one before a pod stops."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.unit.chart.rendering import one, pod_templates, render
from xloom.router.draining import Draining, folder_of

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


class Pod:
    """The folder in which routers of a port and the script before a pod's end meet, and the script itself."""

    def __init__(self, drain_timeout_s: float = 60) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port: int = taken.getsockname()[1]
        self.folder = folder_of(self.port)
        values = {"settings": {"router": {"port": self.port}, "replicas": {"drain_timeout_s": drain_timeout_s}}}
        lifecycle = pod_templates(render(values))["worker cpu"]["spec"]["containers"][0]["lifecycle"]
        *self._shell, script = lifecycle["preStop"]["exec"]["command"]
        assert "sleep 5\n" in script
        self._script = script.replace("sleep 5\n", "").replace("sleep 1\n", "sleep 0.05\n")

    def stop(self) -> subprocess.Popen[bytes]:
        """What the kubelet runs."""
        return subprocess.Popen([*self._shell, self._script])


@pytest.fixture
def pod() -> Iterator[Pod]:
    found = Pod()
    yield found
    shutil.rmtree(found.folder, ignore_errors=True)


async def test_a_pod_goes_once_each_of_its_routers_has_answered(pod: Pod) -> None:
    """Two routers may share a pod's port, where one of them answers whoever asks there."""
    left, told = 1, asyncio.Event()
    router = Draining(pod.port, lambda: left, lambda asked: told.set())
    router.start()
    other = await asyncio.create_subprocess_exec("sleep", "60")  # another router's process
    (pod.folder / str(other.pid)).touch()
    stopping = pod.stop()
    await asyncio.wait_for(told.wait(), 20)
    left = 0
    while (pod.folder / str(os.getpid())).exists():
        await asyncio.sleep(0.02)
    assert stopping.poll() is None  # for the other one
    other.kill()
    await other.wait()
    assert await asyncio.to_thread(stopping.wait, 20) == 0
    router.close()


def test_a_pod_without_a_router_goes_at_once(pod: Pod) -> None:
    assert pod.stop().wait(20) == 0
    pod.folder.mkdir(parents=True)
    (pod.folder / "999999999").touch()  # of a router that was killed
    assert pod.stop().wait(20) == 0
    assert not (pod.folder / "drain").exists()


def test_a_pod_waits_no_longer_than_the_drain_timeout() -> None:
    pod = Pod(drain_timeout_s=1)
    pod.folder.mkdir(parents=True)
    (pod.folder / str(os.getpid())).touch()
    try:
        assert pod.stop().wait(20) == 0
    finally:
        shutil.rmtree(pod.folder)
