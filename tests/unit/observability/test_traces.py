from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from cluster.local_cluster import free_port
from xloom.observability import traces
from xloom.protocol import XloomError
from xloom.router.errors import Message, Receive, Scope, Send
from xloom.router.request_id import RequestIdMiddleware
from xloom.settings import TraceSettings, parse_settings

pytest.importorskip("opentelemetry.sdk.trace")

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collected:
    """Tracing of one room, and the spans that have ended."""

    def __init__(self, sample: float = 1.0) -> None:
        self._memory = InMemorySpanExporter()
        self.tracing = traces.Tracing(SimpleSpanProcessor(self._memory), "router", "router-1", sample)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._memory.get_finished_spans()


async def call(tracing: traces.Tracing, path: str, status: int = 200, **headers: str) -> list[str]:
    """One request through the middleware; returns the names of the headers that the app saw."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(name.decode() for name, _ in scope["headers"])
        scope["route"] = type("Route", (), {"path": "/v1/things/{name}"})
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})

    async def ignore(message: Message) -> None:
        pass

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": raw}
    await RequestIdMiddleware(app, tracing=tracing)(scope, None, ignore)  # type: ignore[arg-type]
    return seen


async def test_a_request_continues_the_clients_trace() -> None:
    collected = Collected()
    seen = await call(collected.tracing, "/v1/things/x", traceparent=f"00-{TRACE}-{CALLER}-01", tracestate="vendor=1")
    [span] = collected.spans
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, CALLER)
    assert span.context.trace_state.get("vendor") == "1"
    assert (span.name, span.kind) == ("GET /v1/things/{name}", SpanKind.SERVER)
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["url.path"] == "/v1/things/x"
    assert seen == ["x-request-id"]  # vLLM's own tracing is off, and it would say so


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{CALLER}-01", "x" * 5000])
async def test_nonsense_begins_a_trace_of_its_own(traceparent: str) -> None:
    collected = Collected()
    await call(collected.tracing, "/v1/models", traceparent=traceparent)
    [span] = collected.spans
    assert span.parent is None


async def test_a_client_that_does_not_sample_is_heeded_and_the_share_holds_otherwise() -> None:
    every, none = Collected(1.0), Collected(0.0)
    await call(every.tracing, "/v1/models", traceparent=f"00-{TRACE}-{CALLER}-00")
    await call(none.tracing, "/v1/models")
    assert not every.spans
    assert not none.spans
    await call(none.tracing, "/v1/models", traceparent=f"00-{TRACE}-{CALLER}-01")
    assert len(none.spans) == 1


@pytest.mark.parametrize(
    ("status", "code"), [(200, StatusCode.UNSET), (404, StatusCode.UNSET), (503, StatusCode.ERROR)]
)
async def test_only_faults_of_the_server_are_errors(status: int, code: StatusCode) -> None:
    collected = Collected()
    await call(collected.tracing, "/v1/models", status)
    [span] = collected.spans
    assert span.status.status_code is code


async def test_an_answer_that_never_came_is_an_error() -> None:
    collected = Collected()
    await call(collected.tracing, "/v1/models", 0)
    [span] = collected.spans
    assert span.status.status_code is StatusCode.ERROR


async def test_probes_are_not_traced() -> None:
    collected = Collected()
    for path in ("/health", "/metrics", "/ready"):
        await call(collected.tracing, path)
    assert not collected.spans


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://host/otlp/v1/traces", "https://host/otlp/v1/traces"),
    ],
)
def test_a_collector_is_sent_to_at_otlps_path_or_its_own(endpoint: str, url: str) -> None:
    assert traces.traces_url(endpoint) == url


@pytest.mark.parametrize(
    "endpoint", ["collector:4318", "ftp://collector", "http://", "http://user:secret@collector", "http://c/?key=1"]
)
def test_an_endpoint_is_a_url_without_secrets(endpoint: str) -> None:
    with pytest.raises(XloomError, match=r"observability\.traces\.endpoint"):
        parse_settings({"observability": {"traces": {"endpoint": endpoint}}})


def test_without_an_endpoint_there_is_no_tracing() -> None:
    assert traces.start(TraceSettings(), "router", "router-1") is None


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_is_missing_is_named_with_the_extra(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TraceSettings(endpoint="http://collector:4318", protocol=protocol)
    traces.require(settings)

    def find(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(XloomError, match=r"xloom\[traces\]") as caught:
        traces.require(settings)
    assert caught.value.code == "traces_not_installed"
    traces.require(TraceSettings())


Received = list[tuple[str, str]]  # a header's value, and a span's name


def names(request: trace_service_pb2.ExportTraceServiceRequest, header: str) -> Received:
    groups = [scope.spans for resource in request.resource_spans for scope in resource.scope_spans]
    return [(header, span.name) for spans in groups for span in spans]


@contextmanager
def http_collector(received: Received) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            received.extend(names(request, self.headers["x-tenant"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def grpc_collector(received: Received) -> Iterator[int]:
    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.extend(names(request, dict(context.invocation_metadata())["x-tenant"]))
            return trace_service_pb2.ExportTraceServiceResponse()

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port
        server.stop(None).wait()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_spans_arrive_with_the_environments_headers(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ours")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    received: Received = []
    with {"http": http_collector, "grpc": grpc_collector}[protocol](received) as port:
        settings = TraceSettings(endpoint=f"http://127.0.0.1:{port}", protocol=protocol)
        tracing = traces.start(settings, "router", "router-1")
        assert tracing is not None
        await call(tracing, "/v1/models")
        async with asyncio.timeout(60):
            while not received:
                await asyncio.sleep(0.05)
        tracing.close()
    assert received == [("ours", "GET /v1/things/{name}")]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_collector_that_is_away_disturbs_nothing(protocol: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "opentelemetry")
    settings = TraceSettings(endpoint=f"http://127.0.0.1:{free_port()}", protocol=protocol)
    tracing = traces.start(settings, "router", "router-1")
    assert tracing is not None
    for _ in range(5000):  # more than the queue holds
        await call(tracing, "/v1/models")
    tracing.close()
    async with asyncio.timeout(60):
        while any(thread.name.startswith("OtelBatch") for thread in threading.enumerate()):
            await asyncio.sleep(0.05)
