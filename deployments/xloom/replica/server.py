"""The replica's end of the data path: one TCP connection per router, one frame per engine step and router."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
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
    Hello,
    ReplicaFrame,
    Report,
    RequestFailed,
    RouterFrame,
    Step,
    Submit,
    TokenChunk,
    TokenRequest,
    Welcome,
    XloomError,
)
from xloom.verification.engine import Asking
from xloom.wire import FrameReader, FrameWriter

logger = logging.getLogger(__name__)

REPORT_PERIOD_S = 0.5
HELLO_TIMEOUT_S = 10.0
ADAPTER_WAIT_S = 30.0


class Adapters(Protocol):
    """What the server asks about the adapters its engine holds."""

    @property
    def resident(self) -> Collection[AdapterRef]: ...

    async def arrival(self, ref: AdapterRef) -> bool:
        """Wait for an adapter: True once it is resident, False when it will not come."""


class _Connection:
    """One router: its writer, and the requests it owns."""

    def __init__(self, router_id: str, writer: FrameWriter) -> None:
        self.router_id = router_id
        self.requests: dict[str, TokenRequest] = {}
        self.waiting: dict[str, asyncio.Task[None]] = {}  # submissions that wait for their adapter
        self._writer = writer

    def send(self, frame: ReplicaFrame) -> None:
        self._writer.write(frame)

    def close(self) -> None:
        self._writer.close()


class ReplicaServer:
    """Serves one `LLMBackend` to any number of routers."""

    def __init__(
        self,
        backend: LLMBackend,
        replica_id: str,
        token: str,
        adapters: Adapters | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._backend = backend
        self._replica_id = replica_id
        self._token = token.encode()
        self._adapters = adapters
        self._journal = journal
        self._connections: set[_Connection] = set()
        self._owners: dict[str, _Connection] = {}
        self._in_use: Counter[AdapterRef] = Counter()
        self._changed = asyncio.Event()
        self.own = Asking(backend)  # the replica's own requests, which no router sees
        self.on_report: Callable[[EngineStats], None] = lambda stats: None
        self._draining = False
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._pump_error: BaseException | None = None

    def begin(self) -> None:
        """Let tokens flow: for what the replica asks before it listens."""
        if not self._tasks:
            self._tasks.append(asyncio.create_task(self._pump()))

    async def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`; returns the address routers connect to."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.begin()
        self._tasks.append(asyncio.create_task(self._report_periodically()))
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
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
        """Tell every router the state now, ahead of the period."""
        stats = self.stats()
        self.on_report(stats)
        frame = Report(stats, self._draining)
        for connection in self._connections:
            connection.send(frame)

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
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._connections):
            connection.close()

    # One connection.

    async def _serve(self, stream: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        reader: FrameReader[RouterFrame] = FrameReader(stream, RouterFrame)
        writer = FrameWriter(sink)
        connection: _Connection | None = None
        try:
            connection = await self._greet(reader, writer)
            if connection is not None:
                await self._listen(connection, reader)
        except XloomError as error:
            logger.warning("connection of %s: %s", connection.router_id if connection else "a stranger", error)
        finally:
            if connection is not None:
                await self._forget(connection)
            writer.close()

    async def _greet(self, reader: FrameReader[RouterFrame], writer: FrameWriter) -> _Connection | None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await reader.read()
        except TimeoutError:
            return None
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), self._token):
            return None
        connection = _Connection(hello.router_id, writer)
        self._connections.add(connection)
        connection.send(Welcome(self._replica_id))
        connection.send(Report(self.stats(), self._draining))
        return connection

    async def _listen(self, connection: _Connection, reader: FrameReader[RouterFrame]) -> None:
        while (frame := await reader.read()) is not None:
            if isinstance(frame, Submit):
                await self._submit(connection, frame.request)
            elif isinstance(frame, Abort):
                await self._abort(connection, frame.request_ids)

    async def _forget(self, connection: _Connection) -> None:
        """The router is gone: free everything it held."""
        self._connections.discard(connection)
        if connection.requests:
            logger.info("router %s left: aborting its %d requests", connection.router_id, len(connection.requests))
            await self._abort(connection, list(connection.requests))

    # Requests.

    async def _submit(self, connection: _Connection, request: TokenRequest) -> None:
        request_id = request.request_id
        if self._draining or self._pump_error is not None:
            code = "replica_draining" if self._draining else "engine_dead"
            connection.send(RequestFailed(request_id, code, "The replica is going away.", status=503, retryable=True))
            return
        if request_id in self._owners:
            connection.send(RequestFailed(request_id, "duplicate_request", f"{request_id} is already running."))
            return
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

    async def _submit_when_resident(self, connection: _Connection, request: TokenRequest, adapter: AdapterRef) -> None:
        assert self._adapters is not None
        arrived = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADAPTER_WAIT_S):
                arrived = await self._adapters.arrival(adapter)
        connection.waiting.pop(request.request_id, None)
        if arrived:
            await self._hand_over(connection, request)
        elif self._release(request.request_id, "adapter_not_found") is not None:
            message = f"The adapter {adapter.name!r} is not on this replica."
            cure = "GET /v1/models lists what is served."
            connection.send(RequestFailed(request.request_id, "adapter_not_found", message, cure, 404, retryable=True))

    async def _hand_over(self, connection: _Connection, request: TokenRequest) -> None:
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
            connection.send(RequestFailed(request_id, error.code, error.message, error.cure, error.status))
        except Exception as error:
            logger.exception("the engine refused request %s", request_id, extra=fields(request_id=request.client_id))
            self._release(request_id, "engine_error")
            connection.send(RequestFailed(request_id, "engine_error", f"The engine refused the request: {error}"))
        else:
            if self._owners.get(request_id) is not connection:  # aborted while the engine took it
                await self._backend.abort([request_id])

    async def _abort(self, connection: _Connection, request_ids: list[str]) -> None:
        held = [request_id for request_id in request_ids if self._owners.get(request_id) is connection]
        for request_id in held:
            waiting = connection.waiting.pop(request_id, None)
            if waiting is not None:
                waiting.cancel()
        if held and self._pump_error is None:
            try:
                await self._backend.abort(held)
            except Exception:
                logger.exception("aborting %d requests failed", len(held))
        for request_id in held:
            self._release(request_id)

    def _release(self, request_id: str, error: str | None = None) -> _Connection | None:
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
                groups: dict[_Connection, list[TokenChunk]] = {}
                for chunk in chunks:
                    connection = self._owners.get(chunk.request_id)
                    if connection is None:
                        self.own.take(chunk)  # or aborted
                        continue
                    groups.setdefault(connection, []).append(chunk)
                    if chunk.finish_reason is not None:
                        self._release(chunk.request_id)
                for connection, group in groups.items():
                    connection.send(Step(group))
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
                message = "The engine of the replica has died."
                connection.send(RequestFailed(request_id, "engine_dead", message, status=503, retryable=True))

    async def _report_periodically(self) -> None:
        while True:
            try:
                self.report()
            except Exception:
                logger.exception("reporting failed")
            await asyncio.sleep(REPORT_PERIOD_S)
