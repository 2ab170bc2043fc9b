"""One HTTP connection of a router: uvicorn's, with limits on what may be sent before an application hears of it.

Relies on uvicorn 0.54 `uvicorn.protocols.http.httptools_impl.HttpToolsProtocol`: `connection_made`, `data_received`,
its parser's callbacks (`on_message_begin`, `on_header`, `on_headers_complete`, `on_body`, `on_message_complete`),
`on_response_complete`, and its `transport`, `connections`, `cycle`, `headers` and `url`.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from xloom.protocol import XloomError
from xloom.router.errors import error_body
from xloom.settings import LimitSettings

HEADERS = 256  # of one request: applications look them up one by one
LINGER_S = 5.0  # how long the rest of a body that nobody reads is thrown away, so that its sender sees the answer


class LimitedConnection(HttpToolsProtocol):
    """Closes what sends too large a head, too slowly, or goes on sending a body that was refused."""

    def __init__(self, limits: LimitSettings, idle: dict[LimitedConnection, None], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._idle = idle  # those of the listener that wait for a head, the oldest first
        self._unparsed = 0  # bytes received since the last head or message was complete
        self._in_head = self._in_message = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                self._refuse(XloomError("too_many_connections", "Too many connections.", "Retry later.", 503))
                return
            self._idle.pop(oldest)
            oldest.transport.abort()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        if self.transport.is_closing():
            return
        if not self._in_message and self._timer is None and not self._is_answering:
            self._await_head()  # the next request of a kept connection begins
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._unparsed > self._limits.header_bytes:
            self._refuse_head()
        elif self._in_message and self._unparsed > self._limits.header_bytes + 2 * self._limits.body_bytes:
            what = "The body's chunks and trailers are larger than the body may be."
            self._refuse(XloomError("body_too_large", what, "Send larger chunks.", 413))
        elif self._in_message and self.cycle is not None and not self._is_answering:
            if self._timer is None:
                self._timer = self.loop.call_later(LINGER_S, self._abort)
            if self._unparsed > self._limits.body_bytes:
                self._abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers of a body in chunks, which nobody reads, would come without a limit
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes or len(self.headers) > HEADERS:
            self._refuse_head()
            return
        self._stop()
        self._idle.pop(self, None)
        self._unparsed = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._unparsed = 0
        self._stop()
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_head:
            self._await_head()
        elif not self._in_message and not self._is_answering:
            self._idle[self] = None

    def _unsupported_upgrade_warning(self) -> None:
        """No route upgrades: the request is answered as any other."""

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._idle[self] = None
        self._stop()
        self._timer = self.loop.call_later(self._limits.header_timeout_s, self._time_out)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        what = f"The request's head was not sent within {self._limits.header_timeout_s:g} s."
        self._refuse(XloomError("request_timeout", what, "Send it faster.", 408))

    def _abort(self) -> None:
        self._timer = None
        self.transport.abort()

    def _refuse_head(self) -> None:
        what = f"Request line and headers are over {self._limits.header_bytes} bytes, or over {HEADERS}."
        self._refuse(XloomError("headers_too_large", what, "Send less.", 431))

    def _refuse(self, error: XloomError) -> None:
        """Answer and close; what was begun before on this connection, if anything, ends with it."""
        self._idle.pop(self, None)
        self._stop()
        if not self._is_answering:
            body = json.dumps(error_body(error)).encode()
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


def limited(limits: LimitSettings) -> type[asyncio.Protocol]:
    """The protocol class of one listener, as `uvicorn.Config(http=...)` takes it."""
    idle: dict[LimitedConnection, None] = {}

    class Connection(LimitedConnection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(limits, idle, *args, **options)

    return Connection
