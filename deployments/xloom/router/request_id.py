"""The id of an HTTP request: taken from the client or made, known to all that is logged, and in every answer.

vLLM's front end makes its own ids of it (`cmpl-ID`, `chatcmpl-ID`) when it stands in `X-Request-Id`:
`vllm.entrypoints.serve.engine.serving.BaseServing._base_request_id`, 0.32.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from xloom.observability.logs import bind, fields, holds_key
from xloom.router.errors import App, Message, Receive, Scope, Send
from xloom.router.routes import is_open

if TYPE_CHECKING:
    from xloom.observability.traces import HttpSpan, Tracing

logger = logging.getLogger("xloom.router.http")

HEADER = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # what ids, logs and headers all bear
_TRACE = frozenset({b"traceparent", b"tracestate"})
_BEARERS = frozenset({b"authorization", b"x-api-key"})

Headers = Iterable[tuple[bytes, bytes]]


def request_id(headers: Headers) -> str:
    """The client's id where it is sane and no key, which other processes' logs would show; else a new one."""
    headers = list(headers)
    given = next((value for name, value in headers if name == HEADER), b"")
    sent = [part for name, value in headers if name in _BEARERS for part in value.split()]
    if _SANE.fullmatch(given) and given not in sent and not holds_key(given.decode("ascii")):
        return given.decode("ascii")
    return uuid.uuid4().hex


class RequestIdMiddleware:
    """ASGI middleware around everything else: a request id for each request, and a span where there is tracing.

    With `lines`, answers with an error status are logged. Probes are neither logged nor traced.
    """

    def __init__(self, app: App, *, tracing: Tracing | None = None, lines: bool = False) -> None:
        self._app, self._tracing, self._lines = app, tracing, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = request_id(scope["headers"])
        span: HttpSpan | None = None
        dropped = {HEADER}
        is_probe = is_open(scope["path"])
        if self._tracing is not None and not is_probe:
            span = self._tracing.http(scope["method"], scope["path"], scope["headers"], identity)
            dropped |= _TRACE  # vLLM would warn that its own tracing is off
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        scope = {**scope, "headers": [*headers, (HEADER, identity.encode())]}
        bind(request_id=identity)  # uvicorn gives each request a task: nothing is left behind
        answer = _Answer(identity.encode(), send)
        began = time.monotonic()
        try:
            if span is None:
                await self._app(scope, receive, answer)
            else:
                with span:
                    await self._app(scope, receive, answer)
        finally:
            if span is not None:
                span.end(answer.status, getattr(scope.get("route"), "path", None))
            if self._lines and answer.status >= 400 and not is_probe:
                seconds = round(time.monotonic() - began, 4)
                told = fields(method=scope["method"], path=scope["path"], status=answer.status, seconds=seconds)
                logger.info("%s %s answered %d", scope["method"], scope["path"], answer.status, extra=told)


class _Answer:
    """Sends an answer on with the id in its headers, and remembers its status."""

    def __init__(self, identity: bytes, send: Send) -> None:
        self.status = 0  # none was sent
        self._identity, self._send = identity, send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() != HEADER]
            message = {**message, "headers": [*kept, (HEADER, self._identity)]}
        await self._send(message)
