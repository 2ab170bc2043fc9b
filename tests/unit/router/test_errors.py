"""Errors in OpenAI's shape with a stable code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xloom.observability.recorder import Recorder
from xloom.observability.table import HTTP_ERRORS
from xloom.router.errors import CodedErrors, Message
from xloom.router.routes import is_open


async def answer(
    status: int, body: bytes, content_type: bytes = b"application/json", **options: Any
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """What comes out when the app inside answers so, in two pieces."""
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        await send({"type": "http.response.body", "body": body[5:]})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await CodedErrors(app, **options)({"type": "http"}, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], content, dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"message": "This model's maximum context length is 8 tokens.", "code": 400}, "context_length_exceeded"),
        (404, {"message": "The model `x` does not exist.", "param": "model", "code": 404}, "model_not_found"),
        (404, {"message": "Not Found", "code": 404}, "not_found"),
        (403, {"message": "This is not for you.", "code": 403}, "forbidden"),  # which no admin key would cure
        (400, {"message": "temperature must be in [0, 2]", "code": 400}, "invalid_request"),
        (500, {"message": "oops", "code": 500}, "internal_error"),
        (503, {"message": "busy", "code": 503}, "unavailable"),
        (404, {"message": "gone", "code": "adapter_not_found"}, "adapter_not_found"),
    ],
)
async def test_each_error_has_the_code_that_fits(status: int, error: dict[str, Any], code: str) -> None:
    got, body, headers = await answer(status, json.dumps({"error": error}).encode())
    assert got == status
    assert json.loads(body)["error"]["code"] == code
    assert json.loads(body)["error"]["message"] == error["message"]
    assert int(headers[b"content-length"]) == len(body)


async def test_a_message_of_the_front_ends_is_reworded_and_one_of_ours_is_not() -> None:
    for code, told in ((400, "SET --FLAG"), ("limit_exceeded", "Set --flag")):
        error = {"error": {"message": "Set --flag", "code": code}}
        _, body, _ = await answer(400, json.dumps(error).encode(), reword=str.upper)
        assert json.loads(body)["error"]["message"] == told


async def test_bare_texts_get_the_shape() -> None:
    for body in (b'{"error": "Unauthorized"}', b'{"detail": "Unauthorized"}'):
        _, content, _ = await answer(401, body)
        assert json.loads(content)["error"]["code"] == "invalid_api_key"


async def test_answers_that_are_no_errors_pass_untouched() -> None:
    assert (await answer(200, b'{"error": {"code": 1}}'))[1] == b'{"error": {"code": 1}}'
    assert (await answer(500, b"plain words", b"text/plain"))[1] == b"plain words"


async def counted(
    status: int, body: bytes, path: str = "/v1/completions", content_type: bytes = b"application/json"
) -> Recorder:
    """What is counted when the app inside answers so."""
    recorder = Recorder()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
        await send({"type": "http.response.body", "body": body})

    async def ignore(message: Message) -> None: ...

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    middleware = CodedErrors(app, uncounted=is_open, recorder=recorder)
    await middleware({"type": "http", "path": path}, receive, ignore)
    return recorder


async def test_errors_are_counted_by_status_and_code() -> None:
    refused = await counted(404, b'{"error": {"message": "The model `x` does not exist.", "param": "model"}}')
    assert refused.value(HTTP_ERRORS, status=404, code="model_not_found") == refused.value(HTTP_ERRORS) == 1
    ours = await counted(503, b'{"error": {"message": "none", "code": "no_replica_ready"}}')
    assert ours.value(HTTP_ERRORS, status=503, code="no_replica_ready") == 1
    plain = await counted(500, b"plain words", content_type=b"text/plain")
    assert plain.value(HTTP_ERRORS, status=500, code="internal_error") == plain.value(HTTP_ERRORS) == 1
    assert (await counted(200, b"{}")).value(HTTP_ERRORS) == 0


async def test_what_a_client_sent_becomes_no_label() -> None:
    for code in ("no-such-model-7c1d", "Sea", "x" * 80, ""):
        body = json.dumps({"error": {"message": "no", "code": code}}).encode()
        assert (await counted(404, body)).value(HTTP_ERRORS, status=404, code="other") == 1


@pytest.mark.parametrize("path", ["/ready", "/health/", "/metrics"])
async def test_refused_probes_are_not_counted(path: str) -> None:
    assert (await counted(503, b'{"error": "not yet"}', path)).value(HTTP_ERRORS) == 0


async def test_anthropics_clients_get_errors_of_their_shape() -> None:
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        error = {"type": "NotFoundError", "message": "The model `x` does not exist."}
        await send({"type": "http.response.body", "body": json.dumps({"type": "error", "error": error}).encode()})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await CodedErrors(app)({"type": "http", "path": "/v1/messages"}, receive, send)
    told = {"type": "not_found_error", "message": "The model `x` does not exist.", "code": "model_not_found"}
    assert json.loads(sent[1]["body"]) == {"type": "error", "error": told}


async def test_types_are_openais() -> None:
    for status, kind in ((400, "invalid_request_error"), (404, "invalid_request_error"), (500, "server_error")):
        body = json.dumps({"error": {"message": "no", "type": "BadRequestError", "code": status}}).encode()
        assert json.loads((await answer(status, body))[1])["error"]["type"] == kind
