"""The Serve deployment that is the endpoint: HTTP in, tokens out to the replicas."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from typing import TYPE_CHECKING, Any

from xloom.observability import logs, traces
from xloom.observability.journal import journal_for
from xloom.observability.recorder import RECORDER
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher
from xloom.router.errors import CodedErrors
from xloom.router.exposure import is_loopback
from xloom.router.front_end import OpenFrontEnd
from xloom.router.guard import Guard, is_open
from xloom.router.http import Control, attach_routes
from xloom.router.keys import Keys
from xloom.router.listener import HttpListener
from xloom.router.manifest_watch import ManifestWatch
from xloom.router.request_id import RequestIdMiddleware
from xloom.router.traffic import Traffic
from xloom.settings import Settings, forget_keys

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from xloom.adapters.client import StoreClient
    from xloom.adapters.source_rules import SourceRules

logger = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
FIRST_MANIFEST_S = 60.0


class Router:
    """An OpenAI front end over the replicas, on a port of its own.

    The HTTP server is this actor's own uvicorn, not Serve's proxy, which costs several times the
    throughput on token streams (docs/data-path.md); Serve starts, checks, restarts and stops it.
    """

    # Serve awaits an async constructor: UserCallableWrapper.initialize_callable, ray/serve/_private/replica.py, 2.60.
    async def __init__(  # type: ignore[misc]
        self,
        replicas: DeploymentHandle,
        settings: Settings,
        token: str,
        max_lora_rank: int,
        store: StoreClient,
        open_front_end: OpenFrontEnd,
        keys: Keys,
        rules: SourceRules,
    ) -> None:
        forget_keys()
        watch, base, router_id = settings.observability, settings.model.served_name, f"router-{uuid.uuid4().hex[:8]}"
        logs.configure(watch.logs, "router", router_id, [token])
        from xloom.router.replica_collector import register

        self._replicas = replicas
        self._starving: asyncio.Task[None] | None = None
        RECORDER.start()
        self._tracing = traces.start(watch.traces, "router", router_id)
        journal = journal_for("router", router_id, base, lines=watch.logs.requests, tracing=self._tracing)
        traffic = Traffic(RECORDER, base)
        self._dispatcher = Dispatcher(self._discover, token, router_id, traffic=traffic, journal=journal)
        self._dispatcher.on_starved = self._ask_for_a_replica
        self._front_end = await open_front_end(settings, self._dispatcher)
        app = self._front_end.app
        logs.adopt("vllm", "uvicorn")
        self._manifest = ManifestWatch(store, self._front_end.take)
        await self._manifest.start(FIRST_MANIFEST_S)
        control = Control(base, max_lora_rank, self._dispatcher, self._manifest, store, rules)
        attach_routes(app, control)
        register(self._dispatcher)
        guarded = Guard(app, keys, local=is_loopback(settings.router.host))
        coded = CodedErrors(guarded, uncounted=is_open)
        identified = RequestIdMiddleware(coded, tracing=self._tracing, lines=watch.logs.requests)
        self._listener = HttpListener(identified, settings.router.host, settings.router.port, _deployment())
        app.state.server = self._listener.server
        self._dispatcher.start()
        await self._listener.start()
        logger.info("listening on %s:%d", settings.router.host, self._listener.port)

    async def describe(self) -> dict[str, Any]:
        """The port it listens on, and whether a replica can answer."""
        return {"port": self._listener.port, "ready": self._dispatcher.is_ready, "pid": os.getpid()}

    async def check_health(self) -> None:
        """Raise when the endpoint no longer works; Serve then starts another."""
        self._listener.check()
        await self._front_end.check_health()

    async def _discover(self) -> list[ReplicaInfo]:
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                found = await self._replicas.broadcast("describe").results_async(return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [ReplicaInfo(**each) for each in found if isinstance(each, dict)]

    def _ask_for_a_replica(self) -> None:
        """Requests wait and none is there: a call queued at Serve's handle is what wakes a deployment at zero."""
        if self._starving is None or self._starving.done():
            self._starving = asyncio.create_task(self._wake())

    async def _wake(self) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(60):
                await self._replicas.describe.remote()
        self._dispatcher.directory.poll_now()

    async def __del__(self) -> None:
        """Finish the answers under way, then stop. Serve awaits this before it kills the actor."""
        listener: HttpListener | None = getattr(self, "_listener", None)
        if listener is None:
            return
        await listener.close()
        await self._manifest.close()
        await self._dispatcher.close()
        self._front_end.shutdown()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def _deployment() -> str:
    """What the routers of one deployment have in common, also over a redeploy, and no others on the machine."""
    import ray
    from ray import serve

    session = ray.get_runtime_context().get_session_name()
    return f"{session} {serve.get_replica_context().app_name}"
