"""Frames as bytes: msgpack, with a limit in bytes for each kind of peer."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from xloom.protocol import XloomError
from xloom.wire.channel import Channel

MAX_STRANGER_FRAME = 1024  # bytes, from a peer that has not proved the token
MAX_ROUTER_FRAME = 9 * 1024 * 1024  # bytes; `requests.MAX_REQUEST` and what is around it
MAX_REPLICA_FRAME = 4 * 1024 * 1024  # bytes; larger answers travel in pieces

_encoder = msgspec.msgpack.Encoder()
_Frame = TypeVar("_Frame")

# What encoding raises for a value that msgpack can't hold: a lone surrogate, an integer beyond 64 bits, a nesting
# beyond the interpreter's, another type. msgspec 0.22.
UNENCODABLE = (ValueError, OverflowError, RecursionError, TypeError, NotImplementedError, msgspec.MsgspecError)
# And decoding, for what it can't read.
UNREADABLE = (ValueError, OverflowError, RecursionError, msgspec.MsgspecError)


def pack(frame: Any) -> bytes:
    """One frame as bytes. Raises one of `UNENCODABLE`."""
    return _encoder.encode(frame)


class FrameReader(Generic[_Frame]):
    """Reads frames of one union of types from a channel."""

    def __init__(self, channel: Channel, frame_type: Any, limit: int) -> None:
        self._channel = channel
        self._decoder: msgspec.msgpack.Decoder[_Frame] = msgspec.msgpack.Decoder(frame_type)
        self._limit = limit

    async def read(self) -> _Frame | None:
        """The next frame, or None when the peer has gone. Raises `XloomError` (bad_frame) on anything malformed."""
        message = await self._channel.receive(self._limit)
        if message is None:
            return None
        try:
            return self._decoder.decode(message)
        except UNREADABLE as error:
            raise XloomError("bad_frame", f"A frame can't be read: {error}") from None
