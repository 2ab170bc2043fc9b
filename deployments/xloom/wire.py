"""Frames on a stream: a four-byte big-endian length, then msgpack."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar

import msgspec

from xloom.protocol import XloomError

MAX_FRAME = 64 * 1024 * 1024  # bytes; a longer one is a broken or hostile peer
MAX_UNSENT = 256 * 1024 * 1024  # bytes a peer may leave unread before it counts as lost

_HEADER = 4
_encoder = msgspec.msgpack.Encoder()
_Frame = TypeVar("_Frame")


def pack(frame: Any) -> bytearray:
    """One frame as bytes, its length in front."""
    buffer = bytearray(_HEADER)
    _encoder.encode_into(frame, buffer, _HEADER)
    buffer[:_HEADER] = (len(buffer) - _HEADER).to_bytes(_HEADER, "big")
    return buffer


class FrameReader(Generic[_Frame]):
    """Reads frames of one union of types from a stream."""

    def __init__(self, stream: asyncio.StreamReader, frame_type: Any, limit: int = MAX_FRAME) -> None:
        self._stream = stream
        self._decoder: msgspec.msgpack.Decoder[_Frame] = msgspec.msgpack.Decoder(frame_type)
        self._limit = limit

    async def read(self) -> _Frame | None:
        """The next frame, or None when the peer closed. Raises `XloomError` (bad_frame) on anything malformed."""
        try:
            header = await self._stream.readexactly(_HEADER)
            length = int.from_bytes(header, "big")
            if length > self._limit:
                raise XloomError("bad_frame", f"A frame of {length} bytes is over the limit of {self._limit}.")
            body = await self._stream.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return None
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise XloomError("bad_frame", f"A frame can't be read: {error}") from None


class FrameWriter:
    """Writes frames to a stream without waiting; a peer that stops reading is cut off."""

    def __init__(self, stream: asyncio.StreamWriter, max_unsent: int = MAX_UNSENT) -> None:
        self._stream = stream
        self._max_unsent = max_unsent

    def write(self, frame: Any) -> None:
        """Queue one frame; the transport sends it at once if the peer reads."""
        if self._stream.transport.is_closing():
            return
        self._stream.write(pack(frame))
        if self._stream.transport.get_write_buffer_size() > self._max_unsent:
            self._stream.transport.abort()

    def close(self) -> None:
        """Close after what is queued was sent."""
        if not self._stream.transport.is_closing():
            self._stream.close()
