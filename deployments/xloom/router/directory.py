"""The replicas a router knows, and its one connection to each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from xloom.protocol import (
    EngineStats,
    Logprobs,
    Ping,
    ReplicaFrame,
    Report,
    RequestFailed,
    RouterFrame,
    Rows,
    Step,
    XloomError,
)
from xloom.wire.channel import Channel, Transport
from xloom.wire.frames import MAX_REPLICA_FRAME, FrameReader, pack
from xloom.wire.greeting import GREETING_TIMEOUT_S, Identity, introduce
from xloom.wire.silence import SILENCE_S, TICK_S, Silence
from xloom.wire.tcp import TCP

logger = logging.getLogger(__name__)

POLL_S = 0.5  # while no replica is connected
STEADY_POLL_S = 3.0  # otherwise: each look costs a call to every replica and the controller's time
FIRST_RETRY_S = 0.5  # after a connection that did not come about; doubled with each
LAST_RETRY_S = 5.0
MISMATCH_RETRY_S = 60.0  # the longest wait where another try can hardly help: another version, another token


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
    channel: Channel
    stats: EngineStats = field(default_factory=EngineStats)
    draining: bool = False
    ready: bool = False
    own: set[str] = field(default_factory=set)  # ids on the wire
    own_at_report: int = 0
    rows: dict[str, Rows] = field(default_factory=dict)  # of chunks that come in pieces, by the id on the wire

    @property
    def state(self) -> Literal["ready", "draining", "lost"]:
        if not self.ready:
            return "lost"
        return "draining" if self.draining else "ready"

    def send(self, frame: RouterFrame) -> None:
        self.channel.send(pack(frame))

    def take_rows(self, rows: Rows) -> None:
        """A piece of a chunk. What is no longer wanted is dropped."""
        if rows.request_id not in self.own:
            return
        known = self.rows.get(rows.request_id)
        if known is None:
            self.rows[rows.request_id] = rows
            return
        self.rows[rows.request_id] = Rows(
            rows.request_id,
            _joined(known.logprobs, rows.logprobs),
            _joined(known.prompt_logprobs, rows.prompt_logprobs),
        )

    def complete(self, step: Step) -> None:
        """Give the step's chunks the pieces that came before."""
        for chunk in step.chunks if self.rows else ():
            rows = self.rows.pop(chunk.request_id, None)
            if rows is not None:
                chunk.logprobs, chunk.prompt_logprobs = rows.logprobs, rows.prompt_logprobs

    def release(self, wire_id: str) -> None:
        """A request is no longer there."""
        self.own.discard(wire_id)
        self.rows.pop(wire_id, None)


def _joined(first: Logprobs | None, second: Logprobs | None) -> Logprobs | None:
    if first is None or second is None:
        return first or second
    first.extend(second)
    return first


@dataclass
class _Retry:
    """A replica that no connection came about with."""

    reason: str  # told once
    wait_s: float
    until: float  # monotonic


class Directory:
    """Keeps one connection to every replica that `discover` names, for as long as it lives."""

    def __init__(
        self,
        discover: Discover,
        token: str,
        router_id: str,
        listener: Listener,
        silent_after_s: float = SILENCE_S,
        transport: Transport = TCP,
    ) -> None:
        self._discover = discover
        self._identity = Identity(token.encode(), router_id)
        self._listener = listener
        self._transport = transport
        self._links: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._retries: dict[str, _Retry] = {}
        self._own_tasks: list[asyncio.Task[None]] = []
        self._poke = asyncio.Event()
        self._silence: Silence[Link] = Silence(silent_after_s)

    @property
    def links(self) -> list[Link]:
        """The connected replicas, draining ones included."""
        return [link for link in self._links.values() if link.ready]

    def start(self) -> None:
        """Begin to look for replicas."""
        self._own_tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._keep_alive())]

    def poll_now(self) -> None:
        """Look at once, ahead of the period."""
        self._poke.set()

    async def close(self) -> None:
        """Drop every connection."""
        tasks = [*self._own_tasks, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self) -> None:
        while True:
            try:
                infos = await self._discover()
                now = time.monotonic()
                for info in infos:
                    retry = self._retries.get(info.replica_id)
                    if info.replica_id not in self._tasks and (retry is None or retry.until <= now):
                        self._tasks[info.replica_id] = asyncio.create_task(self._keep(info))
                named = {info.replica_id for info in infos}
                self._retries = {name: retry for name, retry in self._retries.items() if name in named}
            except Exception as error:
                logger.warning("looking for replicas failed: %s", error)
            self._poke.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEADY_POLL_S if self.links else POLL_S):
                    await self._poke.wait()

    async def _keep_alive(self) -> None:
        """Say that this router is there, and drop the replicas that no longer say so."""
        while True:
            await asyncio.sleep(TICK_S)
            for link in list(self._links.values()):
                link.send(Ping())
            for link in self._silence.look():
                logger.warning("replica %s says nothing any more: it counts as lost", link.info.replica_id)
                self._silence.forget(link)
                link.channel.abort()

    async def _keep(self, info: ReplicaInfo) -> None:
        """One connection, from its start to its end."""
        try:
            channel = await self._connect(info)
            if channel is not None:
                await self._hold(Link(info, channel))
        finally:
            self._tasks.pop(info.replica_id, None)
            self.poll_now()

    async def _hold(self, link: Link) -> None:
        self._links[link.info.replica_id] = link
        self._silence.heard(link)
        try:
            await self._listen(link, FrameReader(link.channel, ReplicaFrame, MAX_REPLICA_FRAME))
        except XloomError as error:
            logger.warning("replica %s: %s", link.info.replica_id, error)
        finally:
            link.ready = False
            self._silence.forget(link)
            self._links.pop(link.info.replica_id, None)
            link.channel.abort()
            self._listener.on_lost(link)

    async def _connect(self, info: ReplicaInfo) -> Channel | None:
        """A connection on which both ends have proved the token; None, with a wait before the next try."""
        channel: Channel | None = None
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                channel = await self._transport.connect(info.host, info.port)
                await introduce(channel, self._identity, info.replica_id)
        except XloomError as error:
            hopeless = error.code in ("version_mismatch", "wrong_token")
            self._put_off(info, error.code, str(error), MISMATCH_RETRY_S if hopeless else LAST_RETRY_S)
        except (OSError, TimeoutError) as error:
            self._put_off(info, type(error).__name__, f"it can't be reached: {error or 'no answer'}", LAST_RETRY_S)
        except asyncio.CancelledError:
            if channel is not None:
                channel.abort()
            raise
        else:
            self._retries.pop(info.replica_id, None)
            return channel
        if channel is not None:
            channel.abort()
        return None

    def _put_off(self, info: ReplicaInfo, reason: str, message: str, longest_s: float) -> None:
        """Try again later, and each time later. One line tells of each reason."""
        before = self._retries.get(info.replica_id)
        told = before is not None and before.reason == reason
        wait_s = min(2 * before.wait_s, longest_s) if before is not None else FIRST_RETRY_S
        self._retries[info.replica_id] = _Retry(reason, wait_s, time.monotonic() + wait_s)
        if not told:
            logger.warning("replica %s at %s:%d: %s", info.replica_id, info.host, info.port, message)

    async def _listen(self, link: Link, reader: FrameReader[ReplicaFrame]) -> None:
        while (frame := await reader.read()) is not None:
            self._silence.heard(link)
            try:
                self._take(link, frame)
            except Exception:  # a mistake of ours, which must not take the other requests' replica away
                logger.exception("a %s of replica %s was not taken", type(frame).__name__, link.info.replica_id)

    def _take(self, link: Link, frame: ReplicaFrame) -> None:
        if isinstance(frame, Step):
            link.complete(frame)
            self._listener.on_step(link, frame)
        elif isinstance(frame, Report):
            self._take_report(link, frame)
        elif isinstance(frame, RequestFailed):
            self._listener.on_refused(link, frame)
        else:
            link.take_rows(frame)

    def _take_report(self, link: Link, report: Report) -> None:
        link.stats, link.draining, link.own_at_report = report.stats, report.draining, len(link.own)
        if not link.ready:
            link.ready = True
            logger.info("replica %s is connected", link.info.replica_id)
            self._listener.on_ready(link)
        self._listener.on_report(link)
