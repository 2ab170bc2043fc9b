"""A replica's connections: who may speak, and who is still there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Protocol

from xloom.protocol import ReplicaFrame, RequestFailed, RouterFrame, TokenChunk, TokenRequest, XloomError
from xloom.wire.channel import Channel, Listening, Transport
from xloom.wire.frames import MAX_ROUTER_FRAME, UNENCODABLE, FrameReader, pack
from xloom.wire.greeting import GREETING_TIMEOUT_S, Identity, admit
from xloom.wire.pieces import Failure, step_frames
from xloom.wire.silence import PING_S, SILENCE_S, TICK_S, Silence
from xloom.wire.tcp import TCP

logger = logging.getLogger(__name__)

MAX_STRANGERS = 64  # connections that have not proved the token; with one more, the oldest of them is dropped
MAX_MESSAGE = 4000  # characters of an error


class Connection:
    """One router: its channel, and the requests it owns."""

    def __init__(self, router_id: str, channel: Channel) -> None:
        self.router_id = router_id
        self.requests: dict[str, TokenRequest] = {}
        self.waiting: dict[str, asyncio.Task[None]] = {}  # submissions that wait for their adapter
        self.channel = channel

    def send(self, frame: ReplicaFrame) -> None:
        """Queue a frame without waiting. Raises what `pack` raises."""
        self.channel.send(pack(frame))

    def send_step(self, chunks: list[TokenChunk]) -> list[Failure]:
        """One engine step's chunks, in one frame or in pieces; returns what could not be sent."""
        frames, failed = step_frames(chunks)
        for frame in frames:
            self.channel.send(frame)
        return failed

    def fail(self, request_id: str, error: XloomError, *, retryable: bool = False) -> None:
        """One request is refused or given up."""
        message, cure = _plain(error.message), _plain(error.cure)
        try:
            self.send(RequestFailed(_plain(request_id), error.code, message, cure, error.status, retryable))
        except UNENCODABLE:
            logger.exception("the failure of a request can't be sent")


def _plain(text: str) -> str:
    """Text that can be sent, whatever an engine wrote into it."""
    return text[:MAX_MESSAGE].encode("utf-8", "replace").decode("utf-8")


class Handler(Protocol):
    """What is done with connections."""

    def opened(self, connection: Connection) -> None: ...
    async def take(self, connection: Connection, frame: RouterFrame) -> None: ...
    async def closed(self, connection: Connection) -> None: ...


class Connections:
    """Those of one replica, from the proof of the token to the end."""

    def __init__(
        self,
        replica_id: str,
        token: str,
        handler: Handler,
        transport: Transport = TCP,
        silent_after_s: float = SILENCE_S,
    ) -> None:
        self._identity = Identity(token.encode(), replica_id)
        self._handler, self._transport = handler, transport
        self._open: set[Connection] = set()
        self._strangers: dict[Channel, None] = {}  # in the order they came
        self._silence: Silence[Connection] = Silence(max(silent_after_s, 3 * PING_S))
        self._listening: Listening | None = None
        self._watch: asyncio.Task[None] | None = None
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._open))

    async def listen(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`; returns the address routers connect to."""
        self._listening = await self._transport.listen(host, self._serve)
        self._watch = asyncio.create_task(self._keep_alive())
        return self._listening.address

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._listening is not None:
            self._listening.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for channel in list(self._strangers):
            channel.abort()
        for connection in self:
            connection.channel.close()

    async def _serve(self, channel: Channel) -> None:
        router_id = await self._greet(channel)
        if router_id is None:
            channel.close()
            return
        connection = Connection(router_id, channel)
        self._open.add(connection)
        self._silence.heard(connection)
        try:
            self._handler.opened(connection)
            reader: FrameReader[RouterFrame] = FrameReader(channel, RouterFrame, MAX_ROUTER_FRAME)
            while (frame := await reader.read()) is not None:
                self._silence.heard(connection)
                await self._handler.take(connection, frame)
        except XloomError as error:
            logger.warning("connection of router %s: %s", router_id, error)
        finally:
            self._open.discard(connection)
            self._silence.forget(connection)
            await self._handler.closed(connection)
            channel.close()

    async def _greet(self, channel: Channel) -> str | None:
        """The router's name once it has proved the token. Strangers have little time, and are few."""
        while len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        self._strangers[channel] = None
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                return await admit(channel, self._identity)
        except TimeoutError:
            self._tell(channel.peer, "greeting_timeout", "It did not finish its greeting.")
        except XloomError as error:
            self._tell(channel.peer, error.code, str(error))
        finally:
            self._strangers.pop(channel, None)
        return None

    def _tell(self, peer: str, code: str, message: str) -> None:
        """One line for each host and reason, however often it comes back."""
        host = peer.rpartition(":")[0]
        if f"{host} {code}" in self._told or len(self._told) >= MAX_STRANGERS:
            return
        self._told.add(f"{host} {code}")
        logger.warning("a connection from %s was turned away: %s", peer, message)

    async def _keep_alive(self) -> None:
        """Drop the routers that no longer say anything, and with them what they hold here."""
        while True:
            await asyncio.sleep(TICK_S)
            for connection in self._silence.look():
                logger.warning("router %s says nothing any more: it counts as lost", connection.router_id)
                self._silence.forget(connection)
                connection.channel.abort()
