"""The composition root: settings become a Serve application. Nothing else knows all packages."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xloom.adapters.limits import Limits
from xloom.adapters.manifest import Entry
from xloom.adapters.source_rules import SourceRules, check_prefixes
from xloom.adapters.wanted import wanted
from xloom.engines.registry import backend_for
from xloom.observability import traces
from xloom.observability.logs import serve_logging
from xloom.protocol import INPUT_KINDS, XloomError
from xloom.router.exposure import check_exposure
from xloom.settings import Settings, parse_settings
from xloom.vllm.front_end.argument_table import check_names

if TYPE_CHECKING:
    from ray.serve import Application

    from xloom.adapters.client import StoreClient

APP_NAME = "xloom"
NAMESPACE = "xloom"
AUTO_RANK = 64  # the least rank `max_lora_rank: auto` leaves room for, so that adapters can be added at run time
ROUTER_CPUS = 0.1
_KILL_MARGIN_S = 10.0  # after the drain, for the engine to stop


@dataclass(frozen=True)
class Placing:
    """What the cluster allows."""

    replica_cpus: float
    loopback: bool  # all on this machine: the data path stays off the network


def lora_rank(settings: Settings, entries: tuple[Entry, ...]) -> int:
    """The rank engines make room for: what the settings say, or what the adapters now served need."""
    if settings.engine.max_lora_rank != "auto":
        return settings.engine.max_lora_rank
    return max([AUTO_RANK, *(entry.rank for entry in entries)])


def build(settings: Settings, store: StoreClient, max_lora_rank: int, placing: Placing) -> Application:
    """The Serve application: engine replicas, and the router in front. Ray must be up."""
    from ray import serve

    from xloom.replica.actor import EngineReplica
    from xloom.router.deployment import Router
    from xloom.router.keys import Keys, without_keys
    from xloom.vllm.front_end import open_front_end

    # Serve keeps the arguments of its deployments, and shows them.
    keys, settings = Keys.of(settings.router), without_keys(settings)
    token = secrets.token_urlsafe(32)
    replicas = settings.replicas
    policy = {
        "policy_function": "xloom.autoscaling.policy:QueueAndPagesPolicy",
        "policy_kwargs": {
            "target_queue_depth": replicas.target_queue_depth,
            "target_kv_occupancy": replicas.target_kv_occupancy,
        },
    }
    scaling: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "initial_replicas": max(1, replicas.min),
                "metrics_interval_s": 1.0,
                "look_back_period_s": 2.0,
                "upscale_delay_s": replicas.upscale_delay_s,
                "downscale_delay_s": replicas.downscale_delay_s,
                "policy": policy,
            }
        }
    engines = serve.deployment(
        EngineReplica,
        name="engine",
        ray_actor_options={"num_cpus": placing.replica_cpus, "num_gpus": replicas.gpus},
        # Requests do not come through Serve: these calls are describe() and broadcasts.
        max_ongoing_requests=1000,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=replicas.drain_timeout_s + _KILL_MARGIN_S,
        logging_config=serve_logging(settings.observability.logs),
        **scaling,
    ).bind(settings, token, max_lora_rank, store, placing.loopback)
    router = serve.deployment(
        Router,
        name="router",
        num_replicas=settings.router.replicas,
        ray_actor_options={"num_cpus": ROUTER_CPUS, "resources": settings.router.resources},
        max_replicas_per_node=settings.router.max_per_node,
        max_ongoing_requests=1000,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=replicas.drain_timeout_s
        + _KILL_MARGIN_S,  # a stream may last as long as a replica's
        logging_config=serve_logging(settings.observability.logs),
    )
    return router.bind(engines, settings, token, max_lora_rank, store, open_front_end, keys, run_time_rules(settings))


def check(settings: Settings) -> None:
    """Raise `XloomError` for what can be refused before anything starts."""
    backend_for(settings)
    traces.require(settings.observability.traces)
    check_exposure(settings.router)
    check_names(settings.router.front_end_args)
    check_prefixes(settings.store.sources)


def own_rules(settings: Settings) -> SourceRules:
    """For what the settings name themselves: any source, within `store.limits`."""
    given = settings.store.limits
    return SourceRules(limits=Limits(given.files, given.bytes, given.depth, given.seconds, given.stall_s))


def run_time_rules(settings: Settings) -> SourceRules:
    """Which sources may be added at run time: those of `store.sources`, and what the settings name themselves."""
    named = [entry.location for entry in (*settings.adapters, *settings.xlora)]
    named += [
        source
        for mixture in settings.mixtures
        for source in settings.sources_of([*mixture.adapters, *mixture.subtract]).values()
    ]
    return replace(own_rules(settings), allowed=(*settings.store.sources, *named))


def for_stored(settings: Settings, entries: tuple[Entry, ...]) -> Settings:
    """The settings with which what is in the store is served: what is `auto` counts its bundles too.

    Raises `XloomError`, unsupported_by_backend among others, for bundles that would not be served.
    """
    if settings.engine.input_gates == "auto":
        kinds = {entry.ref.kind for entry in entries}
        found = settings.input_gates_enabled or not kinds.isdisjoint(INPUT_KINDS)
        engine = settings.engine.model_copy(update={"input_gates": found})
        settings = settings.model_copy(update={"engine": engine})
    bundles = ", ".join(repr(entry.name) for entry in entries if entry.ref.is_mixture)
    if not bundles or settings.xlora_enabled:
        return settings
    cure = "Remove them with the earlier settings (xloom adapters remove), or set another store.path."
    if settings.engine.enable_xlora != "auto":
        message = f"The store holds the mixtures {bundles}, and engine.enable_xlora is false."
        raise XloomError("unsupported_by_backend", message, f"Set it to auto. {cure}")
    engine = settings.engine.model_copy(update={"enable_xlora": True})
    settings = settings.model_copy(update={"engine": engine})
    try:
        backend_for(settings)
    except XloomError as error:
        message = f"The store holds the mixtures {bundles}. {error.message}"
        raise XloomError(error.code, message, f"{error.cure} {cure}", error.status) from None
    return settings


async def open_adapters(settings: Settings) -> tuple[StoreClient, tuple[Entry, ...]]:
    """The adapter store with the settings' adapters and bundles in it. Raises `XloomError`."""
    from xloom.adapters.client import open_store

    store = await open_store(
        settings.store.path,
        settings.model.source,
        max_rank=settings.store.max_rank,
        reserved_names=[settings.model.served_name],
        base_revision=settings.model.revision,
        namespace=NAMESPACE,
        logs=settings.observability.logs,
        stuck_timeout_s=settings.replicas.stuck_timeout_s,
    )
    rules = own_rules(settings)
    for entry in wanted(settings):
        await store.add(
            entry.name,
            entry.source,
            entry.kind,
            entry.overrides,
            replace=True,
            verify=entry.verify,
            configured=True,
            rules=rules,
            blend=entry.blend,
        )
    await store.prune(settings.names)
    return store, await store.entries()


def application(args: dict[str, Any]) -> Application:
    """The application that `serve deploy` imports; `args` are the settings, as `xloom build` writes them.

    Called by Serve on the cluster. Keys come from the environment there, never from `args`. Raises `XloomError`.
    """
    settings = parse_settings(args)
    check(settings)
    store, entries = asyncio.run(open_adapters(settings))
    settings = for_stored(settings, entries)
    return build(settings, store, lora_rank(settings, entries), Placing(settings.replicas.cpus, loopback=False))
