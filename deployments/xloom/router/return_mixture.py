"""How much of a mixture's gates a request wants to see: `"return_mixture": "tokens"` beside what the API has."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal, NamedTuple

import msgspec

from xloom.protocol import XloomError
from xloom.router.body import has_length, sequences_of

Detail = Literal["tokens", "layers"]


class Wanted(NamedTuple):
    """Gates of single tokens that a request asks for."""

    detail: Detail
    sequences: int  # answers in it
    has_length: bool  # whether it says how long they may be


_wanted: ContextVar[Wanted | None] = ContextVar("xloom_return_mixture", default=None)


def take_return_mixture(body: bytes) -> None:
    """Keep what a checked JSON body says for the request of this task. Raises `XloomError` (invalid_request)."""
    wanted = None
    if b'"return_mixture"' in body or b"\\u" in body:  # else it is not worth a second reading
        fields = msgspec.json.decode(body)
        detail = fields.get("return_mixture") if isinstance(fields, dict) else None  # what is none is refused elsewhere
        if detail is not None:
            if detail not in ("tokens", "layers"):
                message = f"`return_mixture` is {str(detail)[:40]!r}."
                raise XloomError("invalid_request", message, "Send tokens or layers, or leave it out.")
            wanted = Wanted(detail, sequences_of(fields), has_length(fields))
    _wanted.set(wanted)


def wanted_gates() -> Wanted | None:
    """What the request that this task serves asks for; None: no gates of single tokens."""
    return _wanted.get()
