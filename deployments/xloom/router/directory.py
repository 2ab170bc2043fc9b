"""The replicas a router knows, and its one connection to each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
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
SILENT_AFTER_S = 10.0  # without a report a replica counts as lost, if others report;
PATIENCE = 3  # this many times as long where none does: a starved machine is slow, not dead
SILENCE_POLL_S = 0.5


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
    heard: float = field(default_factory=time.monotonic)  # when it last reported

    @property
    def state(self) -> Literal["ready", "draining", "lost"]:
        if not self.ready:
            return "lost"
        return "draining" if self.draining else "ready"

    def send(self, frame: RouterFrame) -> None:
        self.writer.write(frame)


class Directory:
    """Keeps one connection to every replica that `discover` names, for as long as it lives."""

    def __init__(
        self,
        discover: Discover,
        token: str,
        router_id: str,
        listener: Listener,
        silent_after_s: float = SILENT_AFTER_S,
    ) -> None:
        self._discover = discover
        self._hello = Hello(token, router_id)
        self._listener = listener
        self._links: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._silent_after_s = silent_after_s
        self._poller: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._poke = asyncio.Event()

    @property
    def links(self) -> list[Link]:
        """The connected replicas, draining ones included."""
        return [link for link in self._links.values() if link.ready]

    def start(self) -> None:
        """Begin to look for replicas."""
        self._poller = asyncio.create_task(self._poll())
        self._watcher = asyncio.create_task(self._watch_silence())

    def poll_now(self) -> None:
        """Look at once, ahead of the period."""
        self._poke.set()

    async def close(self) -> None:
        """Drop every connection."""
        tasks = [task for task in (self._poller, self._watcher, *self._tasks.values()) if task is not None]
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

    async def _watch_silence(self) -> None:
        """Give up the replicas that no longer report. Time in which this process did not run is nobody's silence."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(SILENCE_POLL_S)
            now = time.monotonic()
            late, last = now - last - SILENCE_POLL_S, now
            for link in self._links.values():
                link.heard += max(0.0, late)
            for link in silent(list(self._links.values()), now, self._silent_after_s):
                logger.warning("replica %s has not reported for %.1f s", link.info.replica_id, now - link.heard)
                self._tasks[link.info.replica_id].cancel()

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
        while (frame := await reader.read()) is not None:
            if isinstance(frame, Step):
                self._listener.on_step(link, frame)
            elif isinstance(frame, Report):
                self._take_report(link, frame)
            elif isinstance(frame, RequestFailed):
                self._listener.on_refused(link, frame)
            elif isinstance(frame, Welcome) and frame.replica_id != link.info.replica_id:
                return  # the port has a new owner

    def _take_report(self, link: Link, report: Report) -> None:
        link.heard = time.monotonic()
        link.stats, link.draining, link.own_at_report = report.stats, report.draining, len(link.own)
        if not link.ready:
            link.ready = True
            logger.info("replica %s is connected", link.info.replica_id)
            self._listener.on_ready(link)
        self._listener.on_report(link)


def silent(links: Sequence[Link], now: float, after_s: float) -> list[Link]:
    """Those that have not reported for so long while another one has; where none has, for `PATIENCE` times as long."""
    lively = any(now - link.heard < after_s / 2 for link in links)
    limit = after_s if lively else after_s * PATIENCE
    return [link for link in links if now - link.heard >= limit]
