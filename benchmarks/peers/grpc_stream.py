"""A peer of `xloom.wire.tcp`: messages over a gRPC stream (`grpc.aio`), both ways, one for each connection.

A message travels in pieces of at most 64 KiB, each with a byte in front that says whether more follow: gRPC has one
limit for all peers, and a stranger may make a replica hold no more than that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio

from xloom.protocol import XloomError
from xloom.wire.channel import Channel, Serve
from xloom.wire.greeting import GREETING_TIMEOUT_S

MAX_UNSENT = 256 * 1024 * 1024  # bytes a peer may leave unread before it counts as lost
MAX_PIECE = 64 * 1024  # bytes
MAX_CONNECTIONS = 1024  # to a replica; strangers hold theirs for `GREETING_TIMEOUT_S`

_SERVICE, _METHOD = "xloom.Link", "Open"
_LAST, _MORE = b"\0", b"\1"
_GONE = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError)

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_PIECE + 1),
    ("grpc.max_send_message_length", MAX_PIECE + 1),
    ("grpc.max_metadata_size", 4096),
)
_CLIENT_OPTIONS = (
    *_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # a connection each
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)
_SERVER_OPTIONS = (
    *_OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 1),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", int(GREETING_TIMEOUT_S * 1000)),
    ("grpc.max_connection_idle_ms", int(GREETING_TIMEOUT_S * 1000)),
)


class GrpcChannel:
    """A `Channel` over one stream, seen from either end."""

    def __init__(self, stream: Any, peer: str, max_unsent: int = MAX_UNSENT) -> None:
        self._stream, self._peer, self._max_unsent = stream, peer, max_unsent
        self._unsent: deque[bytes | bytearray] = deque()
        self._unsent_bytes = 0
        self._to_send = asyncio.Event()
        self._closing = self._gone = False
        self._writing = asyncio.create_task(self._write())

    @property
    def peer(self) -> str:
        return self._peer

    async def receive(self, limit: int) -> bytes | None:
        pieces: list[bytes] = []
        size = 0
        while (piece := await self._read()) is not None:
            size += len(piece) - 1
            if size > limit:
                raise XloomError("bad_frame", f"A frame is over the limit of {limit} bytes.")
            if piece[:1] == _LAST:
                return b"".join((*pieces, piece[1:])) if pieces else piece[1:]
            pieces.append(piece[1:])
        return None

    async def _read(self) -> bytes | None:
        try:
            piece = await self._stream.read()
        except _GONE:
            return None
        except asyncio.CancelledError:  # also what a call raises that was cancelled here
            if self._gone:
                return None
            raise
        return None if piece is grpc.aio.EOF or not piece else bytes(piece)

    def send(self, message: bytes | bytearray) -> None:
        if self._closing:
            return
        self._unsent.append(message)
        self._unsent_bytes += len(message)
        self._to_send.set()
        if self._unsent_bytes > self._max_unsent:
            self.abort()

    def close(self) -> None:
        self._closing = True
        self._to_send.set()

    def abort(self) -> None:
        self._closing = self._gone = True
        self._writing.cancel()

    async def _write(self) -> None:
        """The queue, a piece at a time: gRPC takes the next one when the peer has read enough."""
        try:
            while not self._closing or self._unsent:
                while self._unsent:
                    message = self._unsent.popleft()
                    for piece in _pieces(message):
                        await self._stream.write(piece)
                    self._unsent_bytes -= len(message)
                self._to_send.clear()
                if not self._closing:
                    await self._to_send.wait()
        except _GONE:
            pass
        finally:
            self._closing = True
            await self._end()

    async def _end(self) -> None:
        raise NotImplementedError


def _pieces(message: bytes | bytearray) -> Iterator[bytes]:
    for start in range(0, len(message) - MAX_PIECE, MAX_PIECE):
        yield _MORE + message[start : start + MAX_PIECE]
    yield _LAST + message[(max(len(message), 1) - 1) // MAX_PIECE * MAX_PIECE :]


class _ClientChannel(GrpcChannel):
    def __init__(self, channel: grpc.aio.Channel, stream: Any, peer: str) -> None:
        self._channel = channel
        super().__init__(stream, peer)

    async def _end(self) -> None:
        if self._gone:
            self._stream.cancel()
            await self._channel.close()
        else:
            await self._stream.done_writing()

    def abort(self) -> None:
        super().abort()
        self._stream.cancel()


class _ServerChannel(GrpcChannel):
    def __init__(self, stream: Any, peer: str) -> None:
        self.ended = asyncio.Event()
        super().__init__(stream, peer)

    async def _end(self) -> None:
        self.ended.set()

    def abort(self) -> None:
        super().abort()
        self.ended.set()


class _GrpcListening:
    def __init__(self, server: grpc.aio.Server, host: str, port: int) -> None:
        self._server, self._address = server, (host, port)

    @property
    def address(self) -> tuple[str, int]:
        return self._address

    def close(self) -> None:
        self._stopping = asyncio.create_task(self._server.stop(GREETING_TIMEOUT_S))


class GrpcTransport:
    """A `Transport`, without TLS."""

    async def connect(self, host: str, port: int) -> Channel:
        channel = grpc.aio.insecure_channel(f"{host}:{port}", _CLIENT_OPTIONS)
        stream = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")()
        try:
            await stream.wait_for_connection()
        except grpc.RpcError as error:
            await channel.close()
            raise ConnectionError(error.details()) from None
        except BaseException:
            stream.cancel()
            await channel.close()
            raise
        return _ClientChannel(channel, stream, f"{host}:{port}")

    async def listen(self, host: str, serve: Serve) -> _GrpcListening:
        serving: set[asyncio.Task[None]] = set()

        async def handle(_: Any, context: Any) -> None:
            channel = _ServerChannel(context, context.peer().partition(":")[2])
            task = asyncio.create_task(_run(serve, channel))
            serving.add(task)
            task.add_done_callback(serving.discard)
            try:
                await channel.ended.wait()
            finally:
                channel.abort()

        server = grpc.aio.server(options=_SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(handle)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        port = server.add_insecure_port(f"{host}:0")
        await server.start()
        return _GrpcListening(server, host, port)


async def _run(serve: Serve, channel: _ServerChannel) -> None:
    try:
        await serve(channel)
    finally:
        channel.close()


GRPC = GrpcTransport()
