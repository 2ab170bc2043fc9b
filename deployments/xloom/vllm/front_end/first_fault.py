"""Items of the Responses API, checked one by one and aside, up to the first that is none.

pydantic tells the faults of all items of a list, and of each against some thirty types: three milliseconds an item, in
one go, which a thousand empty objects make three seconds of everybody's.

Relies on vLLM 0.32: `vllm.entrypoints.openai.responses.protocol.ResponsesRequest`, whose `input` alone is required.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from pydantic import ValidationError
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from xloom.protocol import XloomError
from xloom.router.errors import App, Receive, Scope, Send, send_error
from xloom.router.limits import replayed

FEW = 8  # items and parts of them whose faults may all be told


class FirstFault:
    """ASGI middleware within the limits on bodies, which come in one piece."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/responses"):
            await self._app(scope, receive, send)
            return
        message = await receive()
        try:
            document = msgspec.json.decode(message.get("body", b""))
            listed = document.get("input") if isinstance(document, dict) else None
            if isinstance(listed, list) and sum(map(_longest, listed)) > FEW:
                await asyncio.to_thread(_check, listed)
        except msgspec.MsgspecError:
            pass  # it is refused further in
        except XloomError as error:
            await send_error(send, error)
            return
        await self._app(scope, replayed(message, receive), send)


def _check(items: list[Any]) -> None:
    """Raises `XloomError` for the first item that is none."""
    for number, item in enumerate(items):
        for part in range(_longest(item)):
            try:
                ResponsesRequest.model_validate({"input": [_thin(item, part)]})
            except ValidationError as error:
                what = f"`input[{number}]` is no item of the Responses API: {error.errors()[0]['msg']}."
                raise XloomError("invalid_request", what, "Mend it.") from None
            except (ValueError, TypeError):  # of vLLM's own checks, which the whole may pass or not
                return


def _longest(value: Any) -> int:
    """Entries of the longest list in a value, at least one."""
    if isinstance(value, dict):
        return max([1, *map(_longest, value.values())])
    return max([1, len(value), *map(_longest, value)]) if isinstance(value, list) else 1


def _thin(value: Any, part: int) -> Any:
    """The value with one entry of each list."""
    if isinstance(value, dict):
        return {name: _thin(each, part) for name, each in value.items()}
    return [_thin(value[min(part, len(value) - 1)], part)] if isinstance(value, list) and value else value
