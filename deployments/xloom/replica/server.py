"""The replica's end of the data path: one connection per router, one frame per engine step and router."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from xloom.engines.base import LLMBackend
from xloom.observability.journal import Journal
from xloom.observability.logs import fields
from xloom.protocol import (
    Abort,
    AdapterRef,
    EngineStats,
    Report,
    RouterFrame,
    Submit,
    TokenChunk,
    TokenRequest,
    XloomError,
)
from xloom.replica.connections import Connection, Connections
from xloom.verification.engine import Asking
from xloom.wire.channel import Transport
from xloom.wire.requests import decode_request
from xloom.wire.silence import SILENCE_S
from xloom.wire.tcp import TCP

logger = logging.getLogger(__name__)

REPORT_PERIOD_S = 0.5
ADAPTER_WAIT_S = 30.0


class Adapters(Protocol):
    """What the server asks about the adapters its engine holds."""

    @property
    def resident(self) -> Collection[AdapterRef]: ...

    async def arrival(self, ref: AdapterRef) -> bool:
        """Wait for an adapter: True once it is resident, False when it will not come."""


class ReplicaServer:
    """Serves one `LLMBackend` to any number of routers."""

    def __init__(
        self,
        backend: LLMBackend,
        replica_id: str,
        token: str,
        adapters: Adapters | None = None,
        journal: Journal | None = None,
        transport: Transport = TCP,
        silent_after_s: float = SILENCE_S,
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self._journal = journal
        self._connections = Connections(replica_id, token, self, transport, silent_after_s)
        self._last_stats = EngineStats()
        self._owners: dict[str, Connection] = {}
        self._in_use: Counter[AdapterRef] = Counter()
        self._changed = asyncio.Event()
        self.own = Asking(backend)  # the replica's own requests, which no router sees
        self.on_report: Callable[[EngineStats], None] = lambda stats: None
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._pump_error: BaseException | None = None

    def begin(self) -> None:
        """Let tokens flow: for what the replica asks before it listens."""
        if not self._tasks:
            self._tasks.append(asyncio.create_task(self._pump()))

    async def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`; returns the address routers connect to."""
        address = await self._connections.listen(host)
        self.begin()
        self._tasks.append(asyncio.create_task(self._report_periodically()))
        return address

    @property
    def in_flight(self) -> int:
        """Requests this replica holds, those waiting for their adapter included."""
        return len(self._owners)

    def users(self, ref: AdapterRef) -> int:
        """Requests that use an adapter now."""
        return self._in_use[ref]

    async def change(self) -> None:
        """Return when some request has ended or begun."""
        self._changed.clear()
        await self._changed.wait()

    def stats(self) -> EngineStats:
        """The engine's newest figures, with the adapters it holds."""
        stats = self._backend.stats()
        if self._adapters is None:
            return stats
        held = sorted(ref.key for ref in self._adapters.resident)
        return msgspec.structs.replace(stats, adapters=held)

    def report(self) -> None:
        """Tell every router the state now, ahead of the period: without it this replica would count as lost."""
        try:
            self._last_stats = self.stats()
        except Exception:
            logger.exception("the engine's figures can't be had")
        frame = Report(self._last_stats, self._draining)
        for connection in self._connections:
            connection.send(frame)
        self.on_report(self._last_stats)

    def check(self) -> None:
        """Raise when tokens no longer flow."""
        if self._pump_error is not None:
            raise RuntimeError("the engine has died") from self._pump_error
        if self._tasks and self._tasks[0].done():
            raise RuntimeError("the engine's steps have ended")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and wait until those held have ended or the time is up."""
        self._draining = True
        self.report()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._owners:
                    await self.change()

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connections.close()

    # One connection: what `Connections` asks of its handler.

    def opened(self, connection: Connection) -> None:
        """A router has come."""
        connection.send(Report(self._last_stats, self._draining))

    async def take(self, connection: Connection, frame: RouterFrame) -> None:
        """A router asks for something. A request's fault ends the request, not the connection."""
        if isinstance(frame, Abort):
            await self._abort(connection, frame.request_ids)
        elif isinstance(frame, Submit):
            request_id = frame.request_id
            try:
                request = decode_request(frame.body)
                if request.request_id != request_id:
                    request = msgspec.structs.replace(request, request_id=request_id)
                await self._submit(connection, request)
            except XloomError as error:
                connection.fail(request_id, error)
            except Exception as error:
                logger.exception("request %s was not taken", request_id)
                await self._give_up(connection, request_id, _engine_error(error))

    async def closed(self, connection: Connection) -> None:
        """The router is gone: free everything it held."""
        if connection.requests:
            logger.info("router %s left: aborting its %d requests", connection.router_id, len(connection.requests))
            await self._abort(connection, list(connection.requests))

    # Requests.

    async def _submit(self, connection: Connection, request: TokenRequest) -> None:
        request_id = request.request_id
        if self._draining or self._pump_error is not None:
            code = "replica_draining" if self._draining else "engine_dead"
            connection.fail(request_id, XloomError(code, "The replica is going away.", status=503), retryable=True)
            return
        if request_id in self._owners:
            raise XloomError("duplicate_request", f"{request_id} is already running.", status=500)
        self._owners[request_id] = connection
        connection.requests[request_id] = request
        if self._journal is not None:
            self._journal.begin(request)
        if request.adapter is not None:
            self._in_use[request.adapter] += 1
            if self._adapters is not None and request.adapter not in self._adapters.resident:
                task = asyncio.create_task(self._submit_when_resident(connection, request, request.adapter))
                connection.waiting[request_id] = task
                return
        await self._hand_over(connection, request)

    async def _submit_when_resident(self, connection: Connection, request: TokenRequest, adapter: AdapterRef) -> None:
        assert self._adapters is not None
        arrived = False
        try:
            async with asyncio.timeout(ADAPTER_WAIT_S):
                arrived = await self._adapters.arrival(adapter)
        except TimeoutError:
            pass
        except Exception:
            logger.exception("waiting for the adapter %s failed", adapter.key)
        connection.waiting.pop(request.request_id, None)
        if arrived:
            await self._hand_over(connection, request)
        elif self._release(request.request_id, "adapter_not_found") is not None:
            message = f"The adapter {adapter.name!r} is not on this replica."
            if adapter.of_requests:
                message = "Of the adapters that the request mixes one was replaced or removed meanwhile."
            cure = "GET /v1/models lists what is served."
            connection.fail(request.request_id, XloomError("adapter_not_found", message, cure, 404), retryable=True)

    async def _hand_over(self, connection: Connection, request: TokenRequest) -> None:
        """Give the request to the engine; what goes wrong with it is its own affair."""
        request_id = request.request_id
        if self._owners.get(request_id) is not connection:  # aborted meanwhile
            return
        try:
            if self._journal is not None:
                self._journal.event(request_id, "handed_to_engine")
            await self._backend.submit(request)
        except XloomError as error:
            self._release(request_id, error.code)
            connection.fail(request_id, error)
        except Exception as error:
            logger.exception("the engine refused request %s", request_id, extra=fields(request_id=request.client_id))
            await self._give_up(connection, request_id, _engine_error(error))
        else:
            if self._owners.get(request_id) is not connection:  # aborted while the engine took it
                await self._abort_in_engine([request_id])

    async def _abort(self, connection: Connection, request_ids: list[str]) -> None:
        held = [request_id for request_id in request_ids if self._owners.get(request_id) is connection]
        for request_id in held:
            waiting = connection.waiting.pop(request_id, None)
            if waiting is not None:
                waiting.cancel()
        await self._abort_in_engine(held)
        for request_id in held:
            self._release(request_id)

    async def _abort_in_engine(self, request_ids: list[str]) -> None:
        if request_ids and self._pump_error is None:
            try:
                await self._backend.abort(request_ids)
            except Exception:
                logger.exception("aborting %d requests failed", len(request_ids))

    async def _give_up(self, connection: Connection, request_id: str, error: XloomError) -> None:
        """End one request here and in the engine, which may hold it or not."""
        self._release(request_id, error.code)
        connection.fail(request_id, error)
        await self._abort_in_engine([request_id])

    def _release(self, request_id: str, error: str | None = None) -> Connection | None:
        """It is no longer held: it has ended, was aborted, or failed with a code."""
        connection = self._owners.pop(request_id, None)
        if connection is None:
            return None
        request = connection.requests.pop(request_id)
        if self._journal is not None:
            self._journal.end(request_id, "error" if error else "abort", error)
        if request.adapter is not None:
            self._in_use[request.adapter] -= 1
            if not self._in_use[request.adapter]:
                del self._in_use[request.adapter]
        self._changed.set()
        return connection

    # Tokens: the hot path. One frame per router and engine step, sent at once.

    async def _pump(self) -> None:
        try:
            async for chunks in self._backend.steps():
                if self._journal is not None:
                    self._journal.step(chunks)
                groups: dict[Connection, list[TokenChunk]] = {}
                for chunk in chunks:
                    connection = self._owners.get(chunk.request_id)
                    if connection is None:
                        self.own.take(chunk)  # or aborted
                        continue
                    groups.setdefault(connection, []).append(chunk)
                    if chunk.finish_reason is not None:
                        self._release(chunk.request_id)
                for connection, group in groups.items():
                    for request_id, failure in connection.send_step(group):
                        logger.error("an answer to request %s was not sent: %s", request_id, failure)
                        await self._give_up(connection, request_id, failure)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            logger.exception("the engine has died")
            self._pump_error = error
        else:
            self._pump_error = RuntimeError("the engine's steps have ended")
        self.own.fail(self._pump_error)
        for request_id in list(self._owners):
            connection = self._release(request_id, "engine_dead")
            if connection is not None:
                died = XloomError("engine_dead", "The engine of the replica has died.", status=503)
                connection.fail(request_id, died, retryable=True)

    async def _report_periodically(self) -> None:
        while True:
            try:
                self.report()
            except Exception:
                logger.exception("reporting failed")
            await asyncio.sleep(REPORT_PERIOD_S)


def _engine_error(error: Exception) -> XloomError:
    return XloomError("engine_error", f"The engine refused the request: {error}", "See the message.", 500)
