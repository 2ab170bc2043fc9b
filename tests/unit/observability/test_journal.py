"""One line and one span for each request, in a router and in replicas that speak over real sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tests.fakes import FakeBackend
from xloom.observability.journal import Journal, journal_for
from xloom.observability.traces import Tracing
from xloom.protocol import AdapterRef, TokenChunk, TokenRequest
from xloom.replica.server import ReplicaServer
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher

pytest.importorskip("opentelemetry.sdk.trace")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TOKEN = "secret"


async def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


class Watched:
    """A router and two replicas, each with a journal; their spans in one place."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.backends = {name: FakeBackend(manual=True) for name in ("a", "b")}
        self.servers = {
            name: ReplicaServer(backend, name, TOKEN, journal=self.journal("replica", name))
            for name, backend in self.backends.items()
        }
        self.infos: list[ReplicaInfo] = []
        self.dispatcher = Dispatcher(self._discover, TOKEN, "router-1", journal=self.journal("router", "router-1"))
        self.tokens: list[int] = []
        self.dispatcher.on_tokens = self._take

    def journal(self, room: Any, member: str) -> Journal:
        tracing = Tracing(SimpleSpanProcessor(self._memory), room, member)
        return Journal(room, member, "base", lines=True, tracing=tracing)

    async def _discover(self) -> list[ReplicaInfo]:
        return list(self.infos)

    def _take(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            self.tokens.extend(chunk.token_ids)

    async def start(self) -> None:
        for name, server in self.servers.items():
            host, port = await server.start("127.0.0.1")
            self.infos.append(ReplicaInfo(name, "node", host, port, 1))
        self.dispatcher.start()
        await until(lambda: len(self.dispatcher.directory.links) == 2)

    async def submit(self, name: str = "cmpl-mine-0", **options: Any) -> str:
        """Hand a request in; returns the replica that has it."""
        options = {"client_id": "mine", "sampling": {"max_tokens": 6, "temperature": 0.5}} | options
        self.dispatcher.submit(TokenRequest(name, [1, 2, 3], **options))
        return await self.holder()

    async def holder(self) -> str:
        await until(lambda: any(backend.requests for backend in self.backends.values()))
        return next(name for name, backend in self.backends.items() if backend.requests)

    async def lose(self, name: str) -> None:
        self.infos = [info for info in self.infos if info.replica_id != name]
        self.backends[name].requests.clear()
        await self.servers[name].close()

    def spans(self, service: str, name: str | None = None) -> list[ReadableSpan]:
        return [
            span
            for span in self._memory.get_finished_spans()
            if span.resource.attributes["service.name"] == service and (name is None or span.name == name)
        ]


@pytest.fixture
async def watched(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Watched]:
    caplog.set_level(logging.INFO, "xloom")
    made = Watched()
    await made.start()
    yield made
    await made.dispatcher.close()
    for server in made.servers.values():
        await server.close()


def told(caplog: pytest.LogCaptureFixture, room: str) -> list[dict[str, Any]]:
    return [vars(record)["fields"] for record in caplog.records if record.name == f"xloom.{room}.requests"]


def identity(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent else None


async def test_one_trace_runs_through_router_and_replica(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    held = await watched.submit(adapter=AdapterRef("code", "9f3a", "lora"))
    watched.backends[held].step(6)
    await until(lambda: len(watched.spans("xloom-replica")) == 1 and len(watched.spans("xloom-router")) == 2)
    [outer] = watched.spans("xloom-router", "text_completion code")
    [place] = watched.spans("xloom-router", "place")
    [inner] = watched.spans("xloom-replica", "text_completion code")
    assert parent(outer) is None
    assert parent(place) == parent(inner) == identity(outer)
    assert (outer.kind, inner.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "code",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length",),
        "xloom.request.id": "mine",
        "xloom.adapter.kind": "lora",
        "xloom.adapter.generation": "9f3a",
        "xloom.replica.id": held,
    }
    for span in (outer, inner):
        assert span.attributes is not None
        assert expected.items() <= dict(span.attributes).items()
        assert "first_token" in [event.name for event in span.events]


async def test_router_and_replica_each_tell_a_request_once(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    held = await watched.submit()
    watched.backends[held].step(6)
    await until(lambda: bool(told(caplog, "router") and told(caplog, "replica")))
    for room in ("router", "replica"):
        [line] = told(caplog, room)
        assert line["request_id"] == "mine"
        assert line["engine_request_id"] == "cmpl-mine-0"
        assert (line["model"], line["kind"], line["replica"]) == ("base", "base", held)
        assert (line["prompt_tokens"], line["generated_tokens"], line["outcome"]) == (3, 6, "length")
        assert 0 <= line["ttft_s"] <= line["seconds"]
        assert len(line["trace_id"]) == 32


async def test_a_lost_replica_is_an_event_and_a_second_placement(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    first = await watched.submit()
    watched.backends[first].step(2)
    await until(lambda: len(watched.tokens) == 2)
    await watched.lose(first)
    second = await watched.holder()
    watched.backends[second].step(4)
    await until(lambda: bool(told(caplog, "router")))
    [line] = told(caplog, "router")
    assert (line["replays"], line["generated_tokens"], line["replica"]) == (1, 6, second)
    [outer] = watched.spans("xloom-router", "text_completion base")
    [event] = [event for event in outer.events if event.name == "replay"]
    assert event.attributes is not None
    assert (event.attributes["xloom.reason"], event.attributes["xloom.generated_tokens"]) == ("replica_lost", 2)
    placed = [span.attributes["xloom.replica.id"] for span in watched.spans("xloom-router", "place") if span.attributes]
    assert placed == [first, second]
    assert {parent(span) for span in watched.spans("xloom-replica")} == {identity(outer)}


@pytest.mark.parametrize("ending", ["stop", "abort"])
async def test_the_routers_own_endings_are_told(
    watched: Watched, caplog: pytest.LogCaptureFixture, ending: Any
) -> None:
    await watched.submit()
    watched.dispatcher.abort(["cmpl-mine-0"], ending)
    await until(lambda: bool(told(caplog, "router") and told(caplog, "replica")))
    assert told(caplog, "router")[0]["outcome"] == ending
    assert told(caplog, "replica")[0]["outcome"] == "abort"


async def test_a_refusal_is_an_error_with_its_code(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.dispatcher.submit(TokenRequest("cmpl-bad-0", [97_000_000], {}, client_id="bad"))
    await until(lambda: bool(told(caplog, "router")))
    for room in ("router", "replica"):
        [line] = told(caplog, room)
        assert (line["outcome"], line["error"], line["ttft_s"]) == ("error", "bad_token", None)
    for span in (*watched.spans("xloom-router", "text_completion base"), *watched.spans("xloom-replica")):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "bad_token"


@pytest.mark.parametrize(
    ("request_id", "operation"),
    [("cmpl-a-0-1", "text_completion"), ("chatcmpl-a-1", "chat"), ("1_chatcmpl-a-1", "chat"), ("resp_a-1", "chat")],
)
async def test_chats_are_named_so(watched: Watched, request_id: str, operation: str) -> None:
    held = await watched.submit(request_id)
    watched.backends[held].step(6)
    await until(lambda: bool(watched.spans("xloom-router", f"{operation} base")))


def test_the_context_crosses_on_the_wire_and_is_left_out_where_there_is_none() -> None:
    plain = TokenRequest("r", [1], {})
    traced = TokenRequest("r", [1], {}, client_id="mine", trace={"traceparent": "00-0af7-b7ad-01"})
    decode = msgspec.msgpack.Decoder(TokenRequest).decode
    for request in (plain, traced):
        assert decode(msgspec.msgpack.encode(request)) == request
    assert b"trace" not in msgspec.msgpack.encode(plain)
    assert b"client_id" not in msgspec.msgpack.encode(plain)


def test_nobody_keeps_a_journal_that_is_not_read() -> None:
    assert journal_for("router", "router-1", "base", lines=False, tracing=None) is None
    assert journal_for("router", "router-1", "base", lines=True, tracing=None) is not None


async def test_without_tracing_lines_are_told_and_nothing_is_sent_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xloom")
    journal = Journal("router", "router-1", "base", lines=True, tracing=None)
    request = TokenRequest("cmpl-a", [1], {}, client_id="mine")
    assert journal.begin(request) == request
    journal.sent("cmpl-a", "a")
    journal.step([TokenChunk("cmpl-a", [5], num_cached_tokens=1), TokenChunk("unknown", [5])])
    journal.step([TokenChunk("cmpl-a", [6, 7], "stop")])
    journal.end("cmpl-a", "abort")
    [line] = told(caplog, "router")
    assert (line["outcome"], line["cached_tokens"], line["generated_tokens"]) == ("stop", 1, 3)
    assert "trace_id" not in line
