"""ASGI middleware that takes in a request's body, within limits of size and time, and checks it before the app."""

from __future__ import annotations

import asyncio

from xloom.protocol import XloomError
from xloom.router.body import BOM, check_body
from xloom.router.errors import App, Message, Receive, Scope, Send, send_error
from xloom.router.return_mixture import take_return_mixture
from xloom.router.weights import take_weights
from xloom.settings import LimitSettings

_ASIDE = 262_144  # bytes; a body over this is checked in a thread, where other tasks get their turns


class BodyLimits:
    """Stands behind the guard: a stranger's body is never read."""

    def __init__(self, app: App, limits: LimitSettings) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            body = await self._read(headers, receive)
            if body is None:
                return  # the client has left
            kinds = [value.lower() for name, value in scope["headers"] if name == b"content-type"]
            if body and (not kinds or any(b"json" in kind for kind in kinds)):  # whichever of them the app reads
                body = body.removeprefix(BOM)
                await self._take(body)
        except XloomError as error:
            await send_error(send, error)
            return
        message = {"type": "http.request", "body": body, "more_body": False}
        await self._app(scope, replayed(message, receive), send)

    async def _take(self, body: bytes) -> None:
        """Check a JSON body, and keep what it says of mixtures; what was read of it goes before the app runs."""
        if len(body) > _ASIDE:
            document = await asyncio.to_thread(check_body, body, self._limits)
        else:
            document = check_body(body, self._limits)
        take_weights(document)
        take_return_mixture(document)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        most = self._limits.body_bytes
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > most:
            raise _too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            what = f"The body was not sent within {self._limits.body_timeout_s:g} s."
            raise XloomError("request_timeout", what, "Send it faster.", 408) from None


def _too_large(most: int) -> XloomError:
    cure = "Send less, or have the operator raise `router.limits.body_bytes`."
    return XloomError("body_too_large", f"The body is over {most} bytes.", cure, 413)


def replayed(message: Message, receive: Receive) -> Receive:
    """Gives a message once more; after it what comes next: of a whole body, that the client leaves."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return message

    return replay
