"""The weights that a request sets for its mixture: `"mixture": {"code": 0.7}` beside what the API has."""

from __future__ import annotations

from contextvars import ContextVar

import msgspec

from xloom.protocol import XloomError

_sent: ContextVar[dict[str, float] | None] = ContextVar("xloom_weights", default=None)


class _Body(msgspec.Struct):
    """Of a request's body, the one field of ours."""

    mixture: dict[str, float] | None = None


def take_weights(body: bytes) -> None:
    """Keep the weights in a JSON body for the request that this task serves. Raises `XloomError` (invalid_weights)."""
    weights = None
    if b'"mixture"' in body or b"\\u" in body:  # else it is not worth a second reading
        try:
            weights = msgspec.json.decode(body, type=_Body).mixture
        except msgspec.ValidationError as error:
            if body.lstrip()[:1] == b"{":  # what is no object is refused elsewhere
                cure = 'Send {"mixture": {"adapter": 0.5}}.'
                raise XloomError("invalid_weights", f"The weights can't be read: {error}.", cure) from None
    _sent.set(weights)


def sent_weights() -> dict[str, float] | None:
    """Those of the request that this task serves; None: it sets none."""
    return _sent.get()
