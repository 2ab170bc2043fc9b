"""The Serve deployment that is the endpoint: HTTP in, tokens out to the replicas."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from xloom.observability import logs, traces
from xloom.observability.journal import journal_for
from xloom.observability.recorder import RECORDER
from xloom.router.console import attach_console
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher
from xloom.router.draining import Draining
from xloom.router.errors import CodedErrors
from xloom.router.exposure import is_loopback
from xloom.router.front_end import OpenFrontEnd
from xloom.router.guard import Guard
from xloom.router.http import Control, attach_routes
from xloom.router.keys import Keys
from xloom.router.limits import BodyLimits
from xloom.router.listener import HttpListener
from xloom.router.manifest_watch import ManifestWatch
from xloom.router.request_id import RequestIdMiddleware
from xloom.router.request_mixtures import RequestMixtures, WeightedRequests
from xloom.router.routes import access, is_open, keep_listed
from xloom.router.start_failures import engine_failure
from xloom.router.traffic import Traffic
from xloom.settings import Settings, forget_keys
from xloom.watchdog import Watchdog

if TYPE_CHECKING:
    from ray.serve._private.replica_result import ReplicaResult
    from ray.serve.handle import DeploymentHandle

    from xloom.adapters.client import StoreClient
    from xloom.adapters.source_rules import SourceRules

logger = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 2.0  # of one replica; it is asked again
FAILURE_PERIOD_S = 2.0
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
        self._watchdog = Watchdog(settings.replicas.stuck_timeout_s)
        self._starving: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._drain_s = settings.replicas.drain_timeout_s
        self._draining: Draining | None = None
        RECORDER.start()
        self._tracing = traces.start(watch.traces, "router", router_id)
        journal = journal_for("router", router_id, base, lines=watch.logs.requests, tracing=self._tracing)
        traffic = Traffic(RECORDER, base)
        self._dispatcher = Dispatcher(
            self._discover,
            token,
            router_id,
            silent_after_s=settings.replicas.stuck_timeout_s,
            traffic=traffic,
            journal=journal,
        )
        self._dispatcher.on_starved = self._ask_for_a_replica
        self._front_end = await open_front_end(settings, self._dispatcher)
        app = self._front_end.app
        logs.adopt("vllm", "uvicorn")
        self._manifest = ManifestWatch(store, self._front_end.take)
        await self._manifest.start(FIRST_MANIFEST_S)
        mixtures, at_most = settings.xlora_enabled, settings.store.request_mixtures
        self._mixtures = RequestMixtures(
            base, self._manifest, store, at_most, max_rank=max_lora_rank, mixtures=mixtures
        )
        self._dispatcher.newest = lambda ref: self._manifest.ref(ref.name)
        control = Control(base, max_lora_rank, self._dispatcher, self._manifest, store, rules, mixtures)
        attach_routes(app, control)
        if settings.router.console:
            attach_console(app)
        keep_listed(app)
        register(self._dispatcher)
        endpoint = settings.router
        limited = BodyLimits(WeightedRequests(app, self._mixtures), endpoint.limits)
        guarded = Guard(limited, partial(access, app), keys, local=is_loopback(endpoint.host))
        coded = CodedErrors(guarded, uncounted=is_open, reword=self._front_end.reword)
        identified = RequestIdMiddleware(coded, tracing=self._tracing, lines=watch.logs.requests)
        self._listener = HttpListener(identified, endpoint.host, endpoint.port, _deployment(), endpoint.limits)
        app.state.server = self._listener.server
        self._dispatcher.start()
        self._mixtures.start()
        await self._listener.start()
        logger.info("listening on %s:%d", settings.router.host, self._listener.port)
        self._draining = Draining(self._listener.port, lambda: self._listener.answers, self._drain)
        self._draining.start()

    def _drain(self, asked: bool) -> None:
        self._dispatcher.draining = asked
        self._listener.keep_connections(not asked)
        logger.info("asked to drain" if asked else "no longer asked to drain")

    async def describe(self) -> dict[str, Any]:
        """The port it listens on, and whether a replica can answer."""
        return {"port": self._listener.port, "ready": self._dispatcher.is_ready, "pid": os.getpid()}

    async def check_health(self) -> None:
        """Raise when the endpoint no longer works; Serve then starts another."""
        self._watchdog.ensure()
        self._listener.check()
        await self._front_end.check_health()

    async def _discover(self) -> list[ReplicaInfo]:
        from ray.serve.exceptions import DeploymentUnavailableError

        # Relied on, since `results_async` waits for all or gives none: _fetch_replica_results_async of a
        # DeploymentBroadcastResponse, and its ReplicaResults' get_async; Ray 2.60.
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                asked = await self._replicas.broadcast("describe")._fetch_replica_results_async()
        except (DeploymentUnavailableError, TimeoutError):
            asked = []
        found = await answers(asked, DESCRIBE_TIMEOUT_S)
        infos = [ReplicaInfo(**each) for each in found if isinstance(each, dict)]
        if infos:
            self._dispatcher.start_failure = ""
        elif self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_why())  # beside the search, which waits for no controller
        return infos

    async def _ask_why(self) -> None:
        """Why no replica is there: asked of the controller no more often than it changes.

        What was told stays where the controller has nothing to add: between two tries its words are empty.
        """
        self._dispatcher.start_failure = await engine_failure() or self._dispatcher.start_failure
        await asyncio.sleep(FAILURE_PERIOD_S)

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
        if self._asking is not None:
            self._asking.cancel()
        await listener.close(self._drain_s)
        if self._draining is not None:
            self._draining.close()
        await self._mixtures.close()
        await self._manifest.close()
        await self._dispatcher.close()
        self._front_end.shutdown()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


async def answers(asked: Sequence[ReplicaResult], timeout_s: float) -> list[Any]:
    """What those say that answer in time; one that is stuck or fails hides none of the others."""
    calls = [asyncio.ensure_future(each.get_async()) for each in asked]
    if not calls:
        return []
    done, late = await asyncio.wait(calls, timeout=timeout_s)
    for call in late:
        call.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [call.result() for call in calls if call in done and not call.cancelled() and call.exception() is None]


def _deployment() -> str:
    """What the routers of one deployment have in common, also over a redeploy, and no others on the machine."""
    import ray
    from ray import serve

    session = ray.get_runtime_context().get_session_name()
    return f"{session} {serve.get_replica_context().app_name}"
