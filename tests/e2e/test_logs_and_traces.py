"""A served model's logs and traces as an operator gets them: JSON files, and an OTLP collector."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .served import ADMIN_KEY, API_KEY, Served, wait_until
from .weights import Weights, settings_for

pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATIENCE_S = 60.0
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(frozen=True)
class Span:
    """A span as it was received."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]


class Collector:
    """An OTLP/HTTP collector on loopback."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                found = self.path == "/v1/traces"
                if found:
                    collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            service = plain(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                for span in scope.spans:
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    self.spans.append(Span(service, span.name, *ids, plain(span.attributes)))

    def of_trace(self, trace: str) -> dict[tuple[str, str], Span]:
        return {(span.service, span.name): span for span in list(self.spans) if span.trace == trace}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def plain(attributes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        values[each.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return values


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(weights: Weights, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    watched = {"logs": {"format": "json", "requests": True}, "traces": {"endpoint": collector.url}}
    settings = settings_for(weights, xlora=[], observability=watched)
    served = Served(tmp_path_factory.mktemp("served"), settings, OTEL_BSP_SCHEDULE_DELAY="200")
    served.wait_ready()
    yield served
    served.stop()


def log_files(server: Served) -> dict[str, str]:
    """Everything that was logged, by file."""
    folders = server._ray_folders()
    files = [file for folder in folders for file in folder.glob("session_latest/logs/**/*") if file.is_file()]
    return {str(file): file.read_text(errors="replace") for file in files}


def lines(server: Served, deployment: str) -> list[dict[str, Any]]:
    """The lines of a deployment's replica."""
    [text] = [text for file, text in log_files(server).items() if f"replica_xloom_{deployment}_" in Path(file).name]
    return [json.loads(line) for line in text.splitlines()]


def about(server: Served, deployment: str, request_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(server, deployment) if line.get("request_id") == request_id]


def complete(server: Served, body: dict[str, Any] | None = None, **headers: str) -> Any:
    asked = {"model": "alpha", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return server.http.post("/v1/completions", json=asked | (body or {}), headers=headers)


def test_a_clients_trace_runs_through_router_and_replica(server: Served, collector: Collector) -> None:
    answer = complete(server, **{"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Request-Id": "traced-1"})
    assert answer.status_code == 200, answer.text
    names = [
        ("xloom-router", "POST /v1/completions"),
        ("xloom-router", "text_completion alpha"),
        ("xloom-router", "place"),
        ("xloom-replica", "text_completion alpha"),
    ]
    wait_until(lambda: set(names) <= collector.of_trace(TRACE).keys(), PATIENCE_S, f"the spans: {collector.spans}")
    spans = collector.of_trace(TRACE)
    http, request, place, replica = (spans[name] for name in names)
    assert http.parent == CALLER
    assert request.parent == http.id
    assert place.parent == replica.parent == request.id
    assert http.attributes["http.response.status_code"] == 200
    assert http.attributes["xloom.request.id"] == "traced-1"
    [card] = [model for model in server.http.get("/v1/models").json()["data"] if model["id"] == "alpha"]
    for span in (request, replica):
        assert span.attributes["gen_ai.request.model"] == "alpha"
        assert span.attributes["gen_ai.usage.input_tokens"] == 3
        assert span.attributes["gen_ai.usage.output_tokens"] == 8
        assert span.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert span.attributes["xloom.adapter.generation"] == card["generation"]
    [known] = server.status()["replicas"]
    assert place.attributes["xloom.replica.id"] == replica.attributes["xloom.replica.id"] == known["id"]


def test_one_id_names_a_request_in_the_answer_and_in_both_logs(server: Served) -> None:
    answer = complete(server, **{"X-Request-Id": "checkout-42"})
    assert answer.headers["X-Request-Id"] == "checkout-42"
    assert answer.json()["id"] == "cmpl-checkout-42"
    for room, deployment in (("router", "router"), ("replica", "engine")):
        wait_until(
            lambda each=deployment: bool(about(server, each, "checkout-42")), PATIENCE_S, f"a line of the {room}"
        )
        [line] = about(server, deployment, "checkout-42")
        assert (line["room"], line["level"], line["logger"]) == (room, "INFO", f"xloom.{room}.requests")
        assert (line["model"], line["kind"], line["outcome"]) == ("alpha", "lora", "length")
        assert (line["prompt_tokens"], line["generated_tokens"]) == (3, 8)
        assert line["engine_request_id"].startswith("cmpl-checkout-42-0")
        assert len(line["trace_id"]) == 32


def test_a_stream_carries_the_id_and_tells_what_stopped_it(server: Served) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 400, "stream": True}
    asked = {"model": "base", "temperature": 0, "ignore_eos": True, **body}
    with server.http.stream("POST", "/v1/completions", json=asked, headers={"X-Request-Id": "left-1"}) as answer:
        assert answer.headers["X-Request-Id"] == "left-1"
        next(answer.iter_lines())
    wait_until(lambda: bool(about(server, "router", "left-1")), PATIENCE_S, "the end of a stream that was left")
    assert about(server, "router", "left-1")[0]["outcome"] in ("abort", "length")


def test_errors_carry_the_id_too(server: Served) -> None:
    no_key = server.http.get("/v1/models", headers={"Authorization": "", "X-Request-Id": "no-key"})
    no_model = complete(server, {"model": "nothing"}, **{"X-Request-Id": "no-model"})
    too_long = complete(server, {"prompt": [5] * 9000}, **{"X-Request-Id": "too-long"})
    no_route = server.http.get("/v1/nothing", headers={"X-Request-Id": "no-route"})
    answers = {"no-key": no_key, "no-model": no_model, "too-long": too_long, "no-route": no_route}
    assert [answer.status_code for answer in answers.values()] == [401, 404, 400, 404]
    for request_id, answer in answers.items():
        assert answer.headers["X-Request-Id"] == request_id
        assert answer.json()["error"]["code"]
        wait_until(lambda each=request_id: bool(about(server, "router", each)), PATIENCE_S, f"a line on {request_id}")
        assert about(server, "router", request_id)[0]["status"] == answer.status_code


def test_an_id_that_is_not_sane_is_replaced(server: Served) -> None:
    ids = [complete(server, **{"X-Request-Id": given}).headers["X-Request-Id"] for given in ("two words", "x" * 200)]
    assert all(len(each) == 32 for each in ids)
    assert len(set(ids)) == 2


def test_every_line_is_json_and_says_who_wrote_it(server: Served) -> None:
    for room, deployment in (("router", "router"), ("replica", "engine")):
        found = lines(server, deployment)
        ours = [line for line in found if line.get("logger", "").startswith("xloom.")]
        assert ours
        assert {line["room"] for line in ours} == {room}
        assert len({line["id"] for line in ours}) == 1
    errors = [text for file, text in log_files(server).items() if Path(file).name.startswith("worker-")]
    stored = [json.loads(line) for text in errors for line in text.splitlines() if '"room": "store"' in line]
    assert any(line["message"].startswith("lora alpha is in the store") for line in stored)


def test_no_key_is_in_any_log(server: Served) -> None:
    complete(server, {"model": f"Bearer {API_KEY}"})
    complete(server, **{"X-Request-Id": API_KEY})
    server.load("../broken", "/nowhere")
    server.admin("load_lora_adapter", {"lora_name": ADMIN_KEY, "lora_path": f"/nowhere/{ADMIN_KEY}"})
    files = log_files(server)
    assert any(files.values())
    for key in (API_KEY, ADMIN_KEY):
        assert [file for file, text in files.items() if key in text] == []
