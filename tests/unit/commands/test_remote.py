"""`xloom chat --url` and `xloom generate --url` against a small OpenAI-like server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xloom.cli import main

CARDS = [{"id": "base", "kind": "base"}, {"id": "code", "kind": "lora"}, {"id": "blend", "kind": "xlora"}]


@dataclass
class Server:
    """What it answers, and what it was asked."""

    events: list[Any]
    cards: list[dict[str, str]] = field(default_factory=lambda: list(CARDS))
    status: int = 200
    url: str = ""
    asked: list[tuple[str, dict[str, Any], str | None]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("XLOOM_ADMIN_KEY", "XLOOM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    fake = Server([])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": fake.cards}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.asked.append((self.path, body, self.headers.get("Authorization")))
            if fake.status != 200:
                self._send(fake.status, json.dumps(fake.events[0]).encode())
                return
            lines = [": a comment", *(f"data: {json.dumps(event)}" for event in fake.events), "data: [DONE]"]
            self._send(200, "\n\n".join(lines).encode())

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    listening.shutdown()
    thread.join()
    listening.server_close()


def said(content: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish}]}


def test_chat_streams_what_the_first_bundle_answers(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.events = [{"choices": [{"delta": {"role": "assistant"}}]}, said("Hel"), said("lo", "stop")]
    server.events.append({"choices": [], "usage": {"completion_tokens": 2}})
    options = ["--url", server.url, "--max-tokens", "7", "--system", "be kind", "--api-key", "secret"]
    assert main(["chat", "--message", "hi", *options]) == 0
    assert capsys.readouterr().out == "Hello\n"
    path, body, authorization = server.asked[0]
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert (body["model"], body["max_tokens"], body["stream"]) == ("blend", 7, True)
    assert "temperature" not in body  # the server's own default


def test_generate_asks_for_a_completion(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.events = [{"choices": [{"text": " upon", "finish_reason": "length"}]}]
    server.events.append({"choices": [], "usage": {"completion_tokens": 1}})
    options = ["--url", server.url, "--model", "code", "--temperature", "0", "--json"]
    assert main(["generate", "once", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"model": "code", "text": " upon", "finish_reason": "length", "num_tokens": 1}
    assert server.asked[0][1]["prompt"] == "once"
    assert server.asked[0][1]["temperature"] == 0


def test_an_unknown_model_is_not_asked_for(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "once", "--url", server.url, "--model", "cod"]) == 2
    printed = capsys.readouterr()
    assert "[model_not_found]" in printed.err
    assert "base, code, blend" in printed.err
    assert server.asked == []


def test_an_endpoint_without_bundles_answers_as_its_base(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.cards = [{"id": "any"}]
    server.events = [said("yes")]
    assert main(["chat", "--message", "hi", "--url", server.url]) == 0
    assert server.asked[0][1]["model"] == "any"


@pytest.mark.parametrize("status", [400, 200], ids=["at once", "in the stream"])
def test_the_endpoints_errors_are_shown_with_their_code(
    server: Server, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    server.status = status
    server.events = [{"error": {"message": "Too long.", "code": "context_length_exceeded"}}]
    assert main(["chat", "--message", "hi", "--url", server.url]) == 2
    assert "Too long. [context_length_exceeded]" in capsys.readouterr().err
