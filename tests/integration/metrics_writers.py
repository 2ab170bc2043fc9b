"""All that writes metrics, in one Ray actor, around a fake engine: for the test of what Ray exports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xloom.adapters.adapter_cache import AdapterCache
from xloom.adapters.client import StoreClient
from xloom.observability.recorder import RECORDER
from xloom.protocol import AdapterRef, EngineStats, TokenChunk, TokenRequest
from xloom.replica.engine_metrics import EngineMetrics
from xloom.replica.reconcile import Reconciler
from xloom.replica.server import ReplicaServer
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher
from xloom.router.errors import CodedErrors
from xloom.router.traffic import Traffic

from ..fakes import FakeBackend


class CrowdedBackend(FakeBackend):
    """Has preempted twice, and found a token of each prompt in its prefix cache."""

    def _next(self, request: TokenRequest) -> TokenChunk:
        chunk = super()._next(request)
        chunk.num_cached_tokens = 1
        return chunk

    def stats(self) -> EngineStats:
        stats = super().stats()
        return EngineStats(stats.running, stats.waiting, stats.kv_pages_used, stats.kv_pages_total, 2, stats.adapters)


async def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.02)


class MetricsWriters:
    """A router and two replicas. Stays, so that its gauges do."""

    async def live(self, store: StoreClient, folder: str, adapter: AdapterRef) -> None:
        """Load the store's adapters, serve, lose a replica, refuse a call."""
        RECORDER.start()
        self._infos: dict[str, ReplicaInfo] = {}
        self._backends: dict[str, FakeBackend] = {}
        self._servers: dict[str, ReplicaServer] = {}
        self._parts: list[Any] = []
        for name in ("one", "two"):
            await self._replica(name, store, Path(folder))
        dispatcher = Dispatcher(self._discover, "secret", "router", traffic=Traffic(RECORDER, "base"))
        dispatcher.start()
        self._parts.append(dispatcher)
        await until(lambda: len(dispatcher.directory.links) == 2)
        dispatcher.submit(TokenRequest("r1", [1, 2, 3], {"max_tokens": 5}))
        dispatcher.submit(TokenRequest("r2", [1, 2, 3], {"max_tokens": 5}, adapter))
        await until(lambda: sum(len(backend.requests) for backend in self._backends.values()) == 2)
        lost, kept = ("one", "two") if self._backends["one"].requests else ("two", "one")
        self._infos.pop(lost)
        await self._servers[lost].close()
        await until(lambda: len(self._backends[kept].requests) == 2)
        self._backends[kept].step(20)
        await until(lambda: dispatcher.in_flight == 0)
        await self._refuse()

    async def _replica(self, name: str, store: StoreClient, folder: Path) -> None:
        backend = self._backends[name] = CrowdedBackend(manual=True)
        reconciler = Reconciler(backend, store, AdapterCache(folder), name, "node")
        server = self._servers[name] = ReplicaServer(backend, name, "secret", reconciler)
        server.on_report = EngineMetrics(RECORDER, name).take
        self._parts.append(reconciler)
        await reconciler.start(60)
        self._infos[name] = ReplicaInfo(name, "node", *await server.start("127.0.0.1"), 1)

    async def _discover(self) -> list[ReplicaInfo]:
        return list(self._infos.values())

    @staticmethod
    async def _refuse() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "none", "param": "model"}}'})

        async def ignore(message: Any) -> None: ...

        await CodedErrors(app)({"type": "http", "path": "/v1/completions"}, ignore, ignore)


class Pressed:
    """A deployment whose queue is always over the policy's target."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"queue_depth": 20.0, "running": 1.0, "kv_occupancy": 0.4}
