"""How much of a mixture's gates a request wants to see: `"return_mixture": "tokens"` beside what the API has."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal

import msgspec

from xloom.protocol import XloomError

Detail = Literal["tokens", "layers"]

_wanted: ContextVar[Detail | None] = ContextVar("xloom_return_mixture", default=None)


class _Body(msgspec.Struct):
    """Of a request's body, the one field of ours."""

    return_mixture: Detail | None = None


def take_return_mixture(body: bytes) -> None:
    """Keep what a JSON body says for the request that this task serves. Raises `XloomError` (invalid_request)."""
    wanted = None
    if b'"return_mixture"' in body or b"\\u" in body:  # else it is not worth a second reading
        try:
            wanted = msgspec.json.decode(body, type=_Body).return_mixture
        except msgspec.ValidationError as error:
            if body.lstrip()[:1] == b"{":  # what is no object is refused elsewhere
                cure = "Send tokens or layers, or leave it out."
                raise XloomError("invalid_request", f"`return_mixture` can't be read: {error}.", cure) from None
    _wanted.set(wanted)


def return_mixture() -> Detail | None:
    """What the request that this task serves asks for; None: no gates of single tokens."""
    return _wanted.get()
