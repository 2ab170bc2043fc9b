"""Messages over TCP: each behind a four-byte big-endian length. With Ray's own TLS on, inside TLS."""

from __future__ import annotations

import asyncio

from xloom.protocol import XloomError
from xloom.wire.channel import Channel, Serve
from xloom.wire.greeting import GREETING_TIMEOUT_S
from xloom.wire.tls import client_context, server_context

MAX_UNSENT = 256 * 1024 * 1024  # bytes a peer may leave unread before it counts as lost

_HEADER = 4


class TcpChannel:
    """A `Channel` over a pair of asyncio streams."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_unsent: int = MAX_UNSENT
    ) -> None:
        self._reader, self._writer, self._max_unsent = reader, writer, max_unsent
        name = writer.get_extra_info("peername")
        self._peer = f"{name[0]}:{name[1]}" if name else "?"

    @property
    def peer(self) -> str:
        return self._peer

    async def receive(self, limit: int) -> bytes | None:
        try:
            length = int.from_bytes(await self._reader.readexactly(_HEADER), "big")
            if length > limit:
                raise XloomError("bad_frame", f"A frame of {length} bytes is over the limit of {limit}.")
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            return None

    def send(self, message: bytes | bytearray) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            return
        self._writer.write(b"".join((len(message).to_bytes(_HEADER, "big"), message)))  # one write: one packet
        if transport.get_write_buffer_size() > self._max_unsent:
            transport.abort()

    def close(self) -> None:
        if not self._writer.transport.is_closing():
            self._writer.close()

    def abort(self) -> None:
        self._writer.transport.abort()


class _TcpListening:
    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self._address: tuple[str, int] = server.sockets[0].getsockname()[:2]

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def close(self) -> None:
        self._server.close()


class TcpTransport:
    """The default `Transport`."""

    async def connect(self, host: str, port: int) -> Channel:
        reader, writer = await asyncio.open_connection(host, port, ssl=client_context())
        return TcpChannel(reader, writer)

    async def listen(self, host: str, serve: Serve) -> _TcpListening:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await serve(TcpChannel(reader, writer))

        context = server_context()
        limit_s = None if context is None else GREETING_TIMEOUT_S  # `serve` begins when the handshake is done
        return _TcpListening(await asyncio.start_server(accept, host, 0, ssl=context, ssl_handshake_timeout=limit_s))


TCP = TcpTransport()
