"""How much of a mixture's gates a request wants to see: `"return_mixture": "tokens"` beside what the API has."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

from xloom.protocol import XloomError
from xloom.router.body import has_length, sequences_of

Detail = Literal["tokens", "layers"]


class Wanted(NamedTuple):
    """Gates of single tokens that a request asks for."""

    detail: Detail
    sequences: int  # answers in it
    has_length: bool  # whether it says how long they may be


_wanted: ContextVar[Wanted | None] = ContextVar("xloom_return_mixture", default=None)


def take_return_mixture(document: Any) -> None:
    """Keep what a checked JSON body says for the request of this task. Raises `XloomError` (invalid_request)."""
    wanted = None
    detail = document.get("return_mixture") if isinstance(document, dict) else None  # what is none is refused elsewhere
    if detail is not None:
        if detail not in ("tokens", "layers"):
            message = f"`return_mixture` is {str(detail)[:40]!r}."
            raise XloomError("invalid_request", message, "Send tokens or layers, or leave it out.")
        wanted = Wanted(detail, sequences_of(document), has_length(document))
    _wanted.set(wanted)


def wanted_gates() -> Wanted | None:
    """What the request that this task serves asks for; None: no gates of single tokens."""
    return _wanted.get()
