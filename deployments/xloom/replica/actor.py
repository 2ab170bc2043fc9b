"""The Serve deployment that owns one engine: its start, health, figures and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from xloom.adapters.adapter_cache import AdapterCache
from xloom.engines.base import LLMBackend
from xloom.engines.registry import backend_for
from xloom.observability import logs, traces
from xloom.observability.journal import journal_for
from xloom.observability.recorder import RECORDER
from xloom.replica.engine_metrics import EngineMetrics
from xloom.replica.mixture_metrics import MixtureMetrics
from xloom.replica.reconcile import Reconciler
from xloom.replica.server import ReplicaServer
from xloom.settings import Settings, forget_keys
from xloom.watchdog import Watchdog

if TYPE_CHECKING:
    from xloom.adapters.client import StoreClient

logger = logging.getLogger(__name__)

FIRST_ADAPTERS_S = 60.0  # how long a start waits for the adapters wanted then


class EngineReplica:
    """One engine, its data-path server, and the adapters it holds."""

    # Serve awaits an async constructor: UserCallableWrapper.initialize_callable, ray/serve/_private/replica.py, 2.60.
    async def __init__(  # type: ignore[misc]
        self, settings: Settings, token: str, max_lora_rank: int, store: StoreClient, loopback: bool
    ) -> None:
        forget_keys()
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._node = ray.get_runtime_context().get_node_id()
        watch = settings.observability
        logs.configure(watch.logs, "replica", self._replica_id, [token])
        os.environ.setdefault("VLLM_LOGGING_COLOR", "0")  # it takes Serve's log file for a terminal
        self._drain_timeout_s = settings.replicas.drain_timeout_s
        self._closed = False
        self._watchdog = Watchdog(settings.replicas.stuck_timeout_s)  # of the engine's processes too
        kind = backend_for(settings)
        self._backend: LLMBackend = await kind.load(
            settings.model,
            settings.engine,
            xlora=settings.xlora_enabled,
            max_lora_rank=max_lora_rank,
            isq=settings.isq,
        )
        logs.adopt("vllm")
        cache = AdapterCache(Path(settings.store.cache))
        self._reconciler = Reconciler(self._backend, store, cache, self._replica_id, self._node)
        # After the engine's processes were started: they are to inherit no thread of these.
        RECORDER.start()
        self._tracing = traces.start(watch.traces, "replica", self._replica_id)
        base, lines = settings.model.served_name, watch.logs.requests
        journal = journal_for("replica", self._replica_id, base, lines=lines, tracing=self._tracing)
        self._server = ReplicaServer(
            self._backend,
            self._replica_id,
            token,
            self._reconciler,
            journal,
            silent_after_s=settings.replicas.stuck_timeout_s,
        )
        self._reconciler.users = self._server.users
        self._reconciler.on_change = self._server.report
        self._server.on_report = EngineMetrics(RECORDER, self._replica_id).take
        self._server.begin()  # what is verified asks the engine
        from xloom.verification.admission import Admission  # it loads torch, which a driver has no use for

        self._reconciler.admit = Admission(self._backend, self._server.own.ask, settings).admit
        await self._reconciler.start(FIRST_ADAPTERS_S)
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self._host, self._port = await self._server.start(host)
        self._mixture_metrics = MixtureMetrics(self._backend, RECORDER, self._replica_id)
        self._mixture_metrics.start()
        logger.info("replica %s serves on %s:%d", self._replica_id, self._host, self._port)

    async def describe(self) -> dict[str, Any]:
        """Where this replica is: what a router needs to connect."""
        return {
            "replica_id": self._replica_id,
            "node": self._node,
            "host": self._host,
            "port": self._port,
            "pid": os.getpid(),
        }

    async def check_health(self) -> None:
        """Raise when the engine is dead; Serve then starts another replica."""
        self._watchdog.ensure()
        self._server.check()
        await self._backend.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The signals of `xloom.autoscaling.policy`."""
        stats = self._server.stats()
        return {
            "queue_depth": float(stats.waiting),
            "running": float(stats.running),
            "kv_occupancy": stats.kv_occupancy,
        }

    async def __del__(self) -> None:
        """Drain, then stop the engine. Serve awaits this before it kills the actor.

        `UserCallableWrapper.call_destructor`, called from `Replica.shutdown` within graceful_shutdown_timeout_s;
        ray/serve/_private/replica.py, 2.60.
        """
        if getattr(self, "_closed", True):
            return
        self._closed = True
        server: ReplicaServer | None = getattr(self, "_server", None)
        if server is not None:
            await server.drain(self._drain_timeout_s)
            await server.close()
        reconciler: Reconciler | None = getattr(self, "_reconciler", None)
        if reconciler is not None:
            await reconciler.close()
        metrics: MixtureMetrics | None = getattr(self, "_mixture_metrics", None)
        if metrics is not None:
            await metrics.close()
        backend: LLMBackend | None = getattr(self, "_backend", None)
        if backend is not None:
            with contextlib.suppress(Exception):
                await backend.close()
        tracing: traces.Tracing | None = getattr(self, "_tracing", None)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
