"""xloom's own routes, beside vLLM's: adapters at run time, readiness, status."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.residency import NOT_VERIFIED, ReplicaReport
from xloom.adapters.source_rules import SourceRules
from xloom.adapters.wanted import described
from xloom.mixtures.weights import MOST_ADAPTERS
from xloom.observability.logs import holds_key
from xloom.protocol import NO_OVERRIDES, REQUESTS, Blend, Overrides, XloomError
from xloom.router.blending import blend_of
from xloom.router.dispatch import Dispatcher
from xloom.router.manifest_watch import ManifestWatch

RESIDENT_TIMEOUT_S = 60.0
VERIFIED_TIMEOUT_S = 300.0  # of one that a replica proves first


class Store(Protocol):
    """The part of `xloom.adapters.client.StoreClient` used here."""

    async def add(
        self,
        name: str,
        source: str,
        kind: str | None = None,
        overrides: Overrides = NO_OVERRIDES,
        *,
        replace: bool = False,
        max_rank: int | None = None,
        verify: bool = False,
        mixtures: bool = True,
        rules: SourceRules | None = None,
        blend: Blend | None = None,
    ) -> Entry: ...
    async def remove(self, name: str) -> Entry | None: ...
    async def revert(self, name: str, generation: str) -> Entry | None: ...
    async def await_resident(self, name: str, generation: str, timeout_s: float) -> list[str]: ...
    async def await_absent(self, name: str, generation: str, timeout_s: float) -> None: ...
    async def desired(self, known_version: int, timeout_s: float) -> Manifest: ...
    async def residency(self) -> dict[str, ReplicaReport]: ...


class _Lenient(BaseModel):
    """A body whose further fields are ignored, as vLLM's are, but for those that look like a slip of the pen."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _no_slips(cls, body: Any) -> Any:
        fields = cls.model_fields
        for name in body if isinstance(body, dict) else ():
            if name not in fields and (near := difflib.get_close_matches(name, fields, n=1, cutoff=0.75)):
                raise ValueError(f"{name!r} is no field here: did you mean {near[0]!r}?")
        return body


class LoadAdapter(_Lenient):
    """vLLM's body of the route, and what a bundle may override."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False  # vLLM's; the prepared files say their own layout
    kind: Literal["lora", "xlora"] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    mixing_mode: Literal["additive", "concatenate", "gated"] | None = None
    routing_passes: Literal[1, 2] | None = None
    prefill: Literal["exact", "lagged"] | None = None
    verify: bool = False  # each replica proves it before serving it


class MixAdapters(_Lenient):
    """A mixture of adapters: those served, by name, or sources."""

    name: str
    adapters: Annotated[list[str], Field(min_length=2, max_length=MOST_ADAPTERS)]
    routing: Literal["arrow", "fixed"] = "arrow"
    weights: dict[str, float] = {}  # of fixed, by adapter; empty: alike, and together 1
    top_k: Annotated[int, Field(ge=1)] | None = None  # of arrow
    temperature: Annotated[float, Field(gt=0)] | None = None  # of arrow
    subtract: Annotated[list[str], Field(max_length=MOST_ADAPTERS)] = []  # of arrow: adapters whose mean is taken off
    replace: bool = False  # take the place of one of the same name
    verify: bool = False  # each replica proves it before serving it


class UnloadAdapter(_Lenient):
    """vLLM's body of the route."""

    lora_name: str
    lora_int_id: int | None = None  # vLLM's; names are enough here


@dataclass(frozen=True)
class Control:
    """What the routes act on."""

    model: str
    max_lora_rank: int
    dispatcher: Dispatcher
    manifest: ManifestWatch
    store: Store
    rules: SourceRules  # for what is added at run time
    mixtures: bool = True  # whether the engines serve X-LoRA bundles

    async def add(self, wanted: LoadAdapter) -> Entry:
        """Take an adapter in and wait until every live replica holds it. Raises `XloomError`."""
        _refuse_keys(wanted.lora_name, wanted.lora_path)
        return await self._resident(
            self.store.add(
                wanted.lora_name,
                wanted.lora_path,
                wanted.kind,
                Overrides.of(wanted),
                replace=wanted.load_inplace,
                max_rank=self.max_lora_rank,
                verify=wanted.verify,
                mixtures=self.mixtures,
                rules=self.rules,
            )
        )

    async def mix(self, wanted: MixAdapters) -> Entry:
        """Take a mixture of adapters in and wait until every live replica holds it. Raises `XloomError`."""
        _refuse_keys(wanted.name, *wanted.adapters, *wanted.subtract)
        options = Blend(wanted.routing, {}, wanted.weights, wanted.top_k, wanted.temperature)
        blend = blend_of(options, wanted.adapters, self.manifest.entries, wanted.subtract)
        return await self._resident(
            self.store.add(
                wanted.name,
                described(blend),
                wanted.routing,
                replace=wanted.replace,
                max_rank=self.max_lora_rank,
                verify=wanted.verify,
                mixtures=self.mixtures,
                rules=self.rules,
                blend=blend,
            )
        )

    async def _resident(self, adding: Awaitable[Entry]) -> Entry:
        """What the store takes in, once every live replica holds it; else it is taken back."""
        had = {entry.key for entry in self.manifest.entries}
        entry = await adding
        try:
            timeout_s = VERIFIED_TIMEOUT_S if entry.verify else RESIDENT_TIMEOUT_S
            await self.store.await_resident(entry.name, entry.generation, timeout_s)
        except XloomError as error:
            if error.code == "store_unavailable":
                raise _unknown(entry, error) from None
            if error.code in ("adapter_load_failed", NOT_VERIFIED) and entry.key not in had:
                await self.store.revert(entry.name, entry.generation)  # it never served: all is as it was
                with contextlib.suppress(XloomError):  # the refusal is what counts
                    await self.manifest.wait_gone(entry.name, entry.generation, RESIDENT_TIMEOUT_S)
            raise
        await self.manifest.wait_for(entry.name, entry.generation, RESIDENT_TIMEOUT_S)
        return entry

    async def remove(self, name: str) -> None:
        """Take an adapter out and wait until no live replica holds it. Raises `XloomError`."""
        _refuse_keys(name)
        entry = await self.store.remove(name)
        # By its version: the name may be there again, added by another one.
        await self.manifest.wait_version((await self.store.desired(-1, 0)).version, RESIDENT_TIMEOUT_S)
        if entry is not None:
            await self.store.await_absent(name, entry.generation, RESIDENT_TIMEOUT_S)

    def replicas(self) -> list[dict[str, Any]]:
        """The connected replicas, as `xloom status` shows them."""
        return [
            {
                "id": link.info.replica_id,
                "node": link.info.node,
                "address": f"{link.info.host}:{link.info.port}",
                "pid": link.info.pid,
                "state": link.state,
                "stats": {
                    "running": link.stats.running,
                    "waiting": link.stats.waiting,
                    "kv_pages_used": link.stats.kv_pages_used,
                    "kv_pages_total": link.stats.kv_pages_total,
                    "preemptions": link.stats.preemptions,
                    "adapters": [key for key in link.stats.adapters if not key.startswith(REQUESTS)],
                },
            }
            for link in self.dispatcher.directory.links
        ]

    def adapters(self) -> list[dict[str, Any]]:
        """What is served, and how many connected replicas hold it."""
        links = self.dispatcher.directory.links
        return [
            {
                "name": entry.name,
                "kind": entry.kind,
                "generation": entry.generation,
                "rank": entry.rank,
                "targets": list(entry.targets),
                "adapters": list(entry.adapters),
                "size": entry.size,
                "source": entry.source,
                "replicas": sum(entry.key in link.stats.adapters for link in links),
            }
            for entry in self.manifest.entries
        ]


def _refuse_keys(*texts: str) -> None:
    """Raise `XloomError` (invalid_request): the store has no keys, and can't leave them out of its logs."""
    if any(map(holds_key, texts)):
        raise XloomError("invalid_request", "A key is part of the adapter's name or source.", "Send it as a header.")


def _unknown(entry: Entry, error: XloomError) -> XloomError:
    """The store took an adapter in, and was away when asked which replicas hold it."""
    said = f"{entry.name!r} was added; whether the replicas hold it already is not known. {error.message}"
    return XloomError(error.code, said, "See `xloom adapters list`.", error.status)


def attach_routes(app: FastAPI, control: Control) -> None:
    """Add our routes to vLLM's app."""
    router = APIRouter()
    handlers: list[tuple[str, str, Callable[..., Awaitable[Any]]]] = []

    async def load_adapter(wanted: LoadAdapter) -> Response:
        entry = await control.add(wanted)
        return Response(f"Success: LoRA adapter '{entry.name}' added successfully.")

    async def unload_adapter(wanted: UnloadAdapter) -> Response:
        await control.remove(wanted.lora_name)
        return Response(f"Success: LoRA adapter '{wanted.lora_name}' removed successfully.")

    async def mix(wanted: MixAdapters) -> dict[str, Any]:
        entry = await control.mix(wanted)
        return {
            "name": entry.name,
            "routing": entry.kind,
            "adapters": list(entry.adapters),
            "rank": entry.rank,
            "generation": entry.generation,
        }

    async def ready() -> dict[str, Any]:
        if control.dispatcher.draining:
            raise XloomError("router_closing", "The router is shutting down.", "Retry.", 503)
        if not control.dispatcher.is_ready:
            raise control.dispatcher.none_ready("No replica can answer now.", "See `xloom status`.")
        return {"ready": True, "replicas": len(control.dispatcher.directory.links)}

    async def status() -> dict[str, Any]:
        dispatcher = control.dispatcher
        return {
            "model": control.model,
            "replicas": control.replicas(),
            "adapters": control.adapters(),
            "start_failure": "" if dispatcher.directory.links else dispatcher.start_failure,
            "router": {"id": dispatcher.router_id, "in_flight": dispatcher.in_flight},
        }

    async def adapters() -> dict[str, Any]:
        return {"adapters": control.adapters()}

    async def alive() -> Response:
        return Response("success")  # what KubeRay's probe of Serve's own proxies expects

    handlers = [
        ("POST", "/v1/load_lora_adapter", load_adapter),
        ("POST", "/v1/unload_lora_adapter", unload_adapter),
        ("POST", "/xloom/mixtures", mix),
        ("GET", "/ready", ready),
        ("GET", "/xloom/status", status),
        ("GET", "/xloom/adapters", adapters),
        ("GET", "/-/healthz", alive),
    ]
    for method, path, handler in handlers:
        router.add_api_route(path, handler, methods=[method], response_model=None)
    app.include_router(router)
