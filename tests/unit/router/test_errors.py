"""Errors in OpenAI's shape with a stable code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xloom.router.errors import CodedErrors, Message


async def answer(
    status: int, body: bytes, content_type: bytes = b"application/json"
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

    await CodedErrors(app)({"type": "http"}, receive, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], content, dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"message": "This model's maximum context length is 8 tokens.", "code": 400}, "context_length_exceeded"),
        (404, {"message": "The model `x` does not exist.", "param": "model", "code": 404}, "model_not_found"),
        (404, {"message": "Not Found", "code": 404}, "not_found"),
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


async def test_bare_texts_get_the_shape() -> None:
    for body in (b'{"error": "Unauthorized"}', b'{"detail": "Unauthorized"}'):
        _, content, _ = await answer(401, body)
        assert json.loads(content)["error"]["code"] == "invalid_api_key"


async def test_answers_that_are_no_errors_pass_untouched() -> None:
    assert (await answer(200, b'{"error": {"code": 1}}'))[1] == b'{"error": {"code": 1}}'
    assert (await answer(500, b"plain words", b"text/plain"))[1] == b"plain words"
