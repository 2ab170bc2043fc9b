"""The weights that a request sets for its mixture: `"mixture": {"code": 0.7}` beside what the API has."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import msgspec

from xloom.protocol import AdapterRef, XloomError


class Sent(msgspec.Struct, frozen=True):
    """What a request's body says of a mixture."""

    model: str | None  # None: not said, which is the base model; or no text, which is refused elsewhere
    weights: dict[str, float]


class _Body(msgspec.Struct):
    """Of a request's body, the fields that are read here."""

    model: Any = None
    mixture: dict[str, float] | None = None


_sent: ContextVar[Sent | None] = ContextVar("xloom_weights", default=None)
_adapter: ContextVar[AdapterRef | None] = ContextVar("xloom_weights_adapter", default=None)


def take_weights(document: Any) -> None:
    """Keep the weights in a checked JSON body for the request of this task. Raises `XloomError` (invalid_weights)."""
    sent = None
    if isinstance(document, dict) and "mixture" in document:  # what is no object is refused elsewhere
        try:
            read = msgspec.convert(document, _Body)
        except msgspec.ValidationError as error:
            cure = 'Send {"mixture": {"adapter": 0.5}}.'
            raise XloomError("invalid_weights", f"The weights can't be read: {error}.", cure) from None
        if read.mixture is not None:
            sent = Sent(read.model if isinstance(read.model, str) else None, read.mixture)
    _sent.set(sent)
    _adapter.set(None)


def sent() -> Sent | None:
    """What the request that this task serves says of a mixture."""
    return _sent.get()


def sent_weights() -> dict[str, float] | None:
    """The weights of the request that this task serves; None: it sets none."""
    said = _sent.get()
    return None if said is None else said.weights


def serve_with(adapter: AdapterRef | None) -> None:
    """What the request that this task serves is to be served with, in place of its model's own; None: that."""
    _adapter.set(adapter)


def adapter_in_place() -> AdapterRef | None:
    """What `serve_with` was told."""
    return _adapter.get()
