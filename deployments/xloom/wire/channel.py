"""What carries messages between a router and a replica: the seam behind which a transport may be swapped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol


class Channel(Protocol):
    """One connection: whole messages in order, both ways. Its two ends run on one event loop each."""

    @property
    def peer(self) -> str:
        """The other end's address, for logs."""

    async def receive(self, limit: int) -> bytes | None:
        """The next message, or None once the peer is gone. One over `limit` bytes is not read.

        Raises `XloomError` (bad_frame).
        """

    def send(self, message: bytes | bytearray) -> None:
        """Queue a message without waiting. A peer that does not read is cut off; a lost one is ignored."""

    def close(self) -> None:
        """Close after what is queued was sent."""

    def abort(self) -> None:
        """Close at once; a pending `receive` returns None."""


Serve = Callable[[Channel], Awaitable[None]]  # one connection, from its start to its end


class Listening(Protocol):
    """A port that takes connections."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""

    def close(self) -> None:
        """Take no more; those there go on."""


class Transport(Protocol):
    """How channels are made."""

    async def connect(self, host: str, port: int) -> Channel:
        """Raises OSError."""

    async def listen(self, host: str, serve: Serve) -> Listening:
        """Listen on a free port; `serve` runs once for each connection."""
