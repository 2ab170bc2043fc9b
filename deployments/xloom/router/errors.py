"""Errors in OpenAI's shape, each with a stable code in `error.code`, which OpenAI's clients read."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from xloom.observability.recorder import OTHER, RECORDER, Recorder
from xloom.observability.table import HTTP_ERRORS
from xloom.protocol import XloomError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BY_STATUS = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "too_many_requests",
    499: "client_closed_request",
    501: "not_implemented",
    503: "unavailable",
}
_NO_MODEL = re.compile(r"^The model `.*` does not exist", re.DOTALL)  # vLLM's `BaseServing._check_model`
_CODE = re.compile(r"[a-z][a-z_]{1,47}")  # the shape of our codes, which are constants: never a client's words
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # 404 has none in OpenAI's API
# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC = "/v1/messages"  # the routes whose clients are Anthropic's

# What vLLM 0.32 says of a prompt that is too long: `vllm.renderers.params.TokenizeParams`,
# `vllm.v1.engine.input_processor.InputProcessor._validate_prompt_len`.
_TOO_LONG = ("maximum context length", "maximum model length", "longer than the maximum")


def code_for(status: int, message: str, param: str | None) -> str:
    """The stable code of an error that vLLM or the web framework raised."""
    if status == 400 and any(phrase in message for phrase in _TOO_LONG):
        return "context_length_exceeded"
    if status == 404 and (param == "model" or _NO_MODEL.search(message)):
        return "model_not_found"
    return _BY_STATUS.get(status, "internal_error" if status >= 500 else "invalid_request")


def error_type(status: int) -> str:
    """OpenAI's `type` of an HTTP status."""
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_body(error: XloomError, param: str | None = None) -> dict[str, Any]:
    """The JSON a client gets."""
    message = f"{error.message} {error.cure}".strip()
    return {"error": {"message": message, "type": error_type(error.status), "param": param, "code": error.code}}


async def send_error(send: Send, error: XloomError) -> None:
    """Answer a request with an error."""
    body = json.dumps(error_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class CodedErrors:
    """ASGI middleware: gives every error answer that has no code of ours the one that fits, and counts them.

    Answers at paths that are `uncounted` are no news: a probe is refused all the while a replica starts.
    """

    def __init__(
        self,
        app: App,
        *,
        uncounted: Callable[[str], bool] = lambda path: False,
        reword: Callable[[str], str] = lambda message: message,
        recorder: Recorder = RECORDER,
    ) -> None:
        self._app, self._uncounted, self._reword, self._recorder = app, uncounted, reword, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = bytearray()

        async def rewrite(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and _is_json(message["headers"]):
                    start = message
                    return
                if message["status"] >= 400:
                    self._count(scope, message["status"], code_for(message["status"], "", None))
            elif start is not None:
                body.extend(message.get("body", b""))
                if message.get("more_body", False):
                    return
                code, coded = _coded(start["status"], bytes(body), self._reword)
                if f"{scope.get('path', '')}/".startswith(f"{_ANTHROPIC}/"):
                    coded = _as_anthropic(start["status"], coded)
                self._count(scope, start["status"], code)
                await self._finish(start, coded, send)
                return
            await send(message)

        await self._app(scope, receive, rewrite)

    @staticmethod
    async def _finish(start: Message, coded: bytes, send: Send) -> None:
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(coded)).encode()))
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": coded})

    def _count(self, scope: Scope, status: int, code: str) -> None:
        if not self._uncounted(scope.get("path", "")):
            self._recorder.inc(HTTP_ERRORS, status=status, code=code if _CODE.fullmatch(code) else OTHER)


def _as_anthropic(status: int, coded: bytes) -> bytes:
    """An error of OpenAI's shape in Anthropic's, the code with it."""
    try:
        error = json.loads(coded)["error"]
    except (ValueError, TypeError, KeyError):
        return coded
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    told = {"type": kind, "message": error.get("message", ""), "code": error.get("code")}
    return json.dumps({"type": "error", "error": told}).encode()


def _is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and b"json" in value for name, value in headers)


def _coded(status: int, body: bytes, reword: Callable[[str], str]) -> tuple[str, bytes]:
    """The code of an error answer, and the answer with it; a message that is not ours is reworded."""
    try:
        answer = json.loads(body)
    except ValueError:
        return code_for(status, "", None), body
    error = answer.get("error", answer.get("detail")) if isinstance(answer, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        error = {"message": f"The request failed with status {status}."}
    if isinstance(error.get("code"), str):
        return error["code"], body
    message, param = str(error.get("message", "")), error.get("param")
    code = code_for(status, message, param)
    answer = {
        "error": {
            "message": reword(message),
            "type": error_type(status),
            "param": param,
            "code": code,
        }
    }
    return code, json.dumps(answer).encode()
