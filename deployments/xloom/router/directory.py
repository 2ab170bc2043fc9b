"""The replicas a router knows, and its one connection to each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from xloom.protocol import (
    EngineStats,
    Hello,
    ReplicaFrame,
    Report,
    RequestFailed,
    RouterFrame,
    Step,
    Welcome,
    XloomError,
)
from xloom.wire import FrameReader, FrameWriter

logger = logging.getLogger(__name__)

POLL_S = 0.5  # while no replica is connected
STEADY_POLL_S = 3.0  # otherwise: each look costs a call to every replica and the controller's time
CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 20.0  # without a report a replica counts as lost; long, since a starved machine is slow, not dead


@dataclass(frozen=True)
class ReplicaInfo:
    """Where a replica is."""

    replica_id: str
    node: str
    host: str
    port: int
    pid: int


Discover = Callable[[], Awaitable[list[ReplicaInfo]]]


class Listener(Protocol):
    """Who is told what happens on the connections."""

    def on_ready(self, link: Link) -> None: ...
    def on_step(self, link: Link, step: Step) -> None: ...
    def on_refused(self, link: Link, failure: RequestFailed) -> None: ...
    def on_report(self, link: Link) -> None: ...
    def on_lost(self, link: Link) -> None: ...


@dataclass(eq=False)
class Link:
    """One replica: the connection, its latest report, and this router's requests there."""

    info: ReplicaInfo
    writer: FrameWriter
    stats: EngineStats = field(default_factory=EngineStats)
    draining: bool = False
    ready: bool = False
    own: set[str] = field(default_factory=set)  # ids on the wire
    own_at_report: int = 0

    @property
    def state(self) -> Literal["ready", "draining", "lost"]:
        if not self.ready:
            return "lost"
        return "draining" if self.draining else "ready"

    def send(self, frame: RouterFrame) -> None:
        self.writer.write(frame)


class Directory:
    """Keeps one connection to every replica that `discover` names, for as long as it lives."""

    def __init__(self, discover: Discover, token: str, router_id: str, listener: Listener) -> None:
        self._discover = discover
        self._hello = Hello(token, router_id)
        self._listener = listener
        self._links: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._poke = asyncio.Event()

    @property
    def links(self) -> list[Link]:
        """The connected replicas, draining ones included."""
        return [link for link in self._links.values() if link.ready]

    def start(self) -> None:
        """Begin to look for replicas."""
        self._poller = asyncio.create_task(self._poll())

    def poll_now(self) -> None:
        """Look at once, ahead of the period."""
        self._poke.set()

    async def close(self) -> None:
        """Drop every connection."""
        tasks = [task for task in (self._poller, *self._tasks.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self) -> None:
        while True:
            try:
                for info in await self._discover():
                    if info.replica_id not in self._tasks:
                        self._tasks[info.replica_id] = asyncio.create_task(self._keep(info))
            except Exception as error:
                logger.warning("looking for replicas failed: %s", error)
            self._poke.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEADY_POLL_S if self.links else POLL_S):
                    await self._poke.wait()

    async def _keep(self, info: ReplicaInfo) -> None:
        """One connection, from its start to its end."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                stream, sink = await asyncio.open_connection(info.host, info.port)
        except (OSError, TimeoutError) as error:
            logger.info("replica %s can't be reached yet: %s", info.replica_id, error)
            self._tasks.pop(info.replica_id, None)
            return
        link = Link(info, FrameWriter(sink))
        self._links[info.replica_id] = link
        try:
            link.send(self._hello)
            await self._listen(link, FrameReader(stream, ReplicaFrame))
        except XloomError as error:
            logger.warning("replica %s: %s", info.replica_id, error)
        finally:
            link.ready = False
            self._links.pop(info.replica_id, None)
            self._tasks.pop(info.replica_id, None)
            sink.transport.abort()
            self._listener.on_lost(link)
            self.poll_now()

    async def _listen(self, link: Link, reader: FrameReader[ReplicaFrame]) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S) as silence:
                while (frame := await reader.read()) is not None:
                    if isinstance(frame, Step):
                        self._listener.on_step(link, frame)
                    elif isinstance(frame, Report):
                        silence.reschedule(loop.time() + SILENCE_S)
                        self._take_report(link, frame)
                    elif isinstance(frame, RequestFailed):
                        self._listener.on_refused(link, frame)
                    elif isinstance(frame, Welcome) and frame.replica_id != link.info.replica_id:
                        return  # the port has a new owner

    def _take_report(self, link: Link, report: Report) -> None:
        link.stats, link.draining, link.own_at_report = report.stats, report.draining, len(link.own)
        if not link.ready:
            link.ready = True
            logger.info("replica %s is connected", link.info.replica_id)
            self._listener.on_ready(link)
        self._listener.on_report(link)
