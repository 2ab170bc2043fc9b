"""Requests with weights of their own: what each is served with is found, or made by the store, before it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from xloom.adapters.manifest import Entry
from xloom.adapters.request_mixtures import HOLD_S, request_mixture_name
from xloom.deadline import limited
from xloom.mixtures.weights import check_set, checked_weights
from xloom.protocol import AdapterRef, XloomError
from xloom.router.errors import App, Receive, Scope, Send, send_error
from xloom.router.manifest_watch import ManifestWatch
from xloom.router.weights import Sent, sent, serve_with
from xloom.settings import RequestMixtureSettings

logger = logging.getLogger(__name__)

KEEP_S = 10.0  # how often the store is told what is in use: well within the time after which it may give way
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


class Store(Protocol):
    """The part of `xloom.adapters.client.StoreClient` used here."""

    async def gather(self, parts: Mapping[str, str], max_rank: int, most: int) -> Entry: ...
    async def await_held(self, name: str, generation: str, timeout_s: float) -> None: ...
    async def keep(self, names: Sequence[str], idle_s: float) -> None: ...


class RequestMixtures:
    """What this router's requests use of the mixtures that the store makes for weights."""

    def __init__(
        self,
        base: str,
        manifest: ManifestWatch,
        store: Store,
        limits: RequestMixtureSettings,
        *,
        max_rank: int,
        mixtures: bool,
    ) -> None:
        self._base, self._manifest, self._store, self._limits = base, manifest, store, limits
        self._max_rank, self._mixtures = max_rank, mixtures
        self._in_use: Counter[str] = Counter()
        self._lately: set[str] = set()  # used since the store was told
        self._told: dict[str, float] = {}  # when the store was last told of one (monotonic)
        self._held: set[str] = set()  # keys of those that a replica has loaded
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell the store what is in use."""
        self._task = asyncio.create_task(self._tell())

    async def close(self) -> None:
        """Stop that."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def adapter_for(self, asked: Sent) -> AdapterRef | None:
        """What takes the place of the model's own; None where that takes the weights, or there is no such model.

        Raises `XloomError`: invalid_weights and rank_too_large before anything is made, mixtures_busy, no_answer and
        those of a store or an engine that fails.
        """
        parts = self._parts(asked)
        if parts is None:
            return None
        name = request_mixture_name(parts)
        self._lately.add(name)
        wait_s = self._limits.wait_s
        began = time.monotonic()
        async with limited(wait_s, "The adapter store", f"putting {', '.join(sorted(parts))} together"):
            entry = self._manifest.entry(name)
            if entry is None or began - self._told.get(name, -HOLD_S) > HOLD_S / 2:  # else it may give way meanwhile
                entry = await self._store.gather(parts, self._max_rank, self._limits.most)
                self._told[name] = began
        if entry.key not in self._held:
            await self._store.await_held(name, entry.generation, max(1.0, wait_s - (time.monotonic() - began)))
            self._held.add(entry.key)
        return entry.ref

    def _parts(self, asked: Sent) -> dict[str, str] | None:
        """The entries that are needed (name -> generation), once the weights are right for the model."""
        entries = {entry.name: entry for entry in self._manifest.entries}
        if asked.model in (None, "", self._base):
            adapters = {name: entry for name, entry in entries.items() if not entry.ref.is_mixture}
            check_set(asked.weights, list(adapters))
            self._check_engines()
            return {name: adapters[name].generation for name in asked.weights}
        model = entries.get(str(asked.model))
        if model is None:
            return None  # the front end says so
        if not model.ref.is_mixture:
            message = f"Weights were sent, and {model.name!r} is an adapter, which takes none."
            raise XloomError("invalid_weights", message, f"Name {self._base!r} or a mixture as the model.")
        checked_weights(asked.weights, model.adapters, model.name)
        return None if model.kind == "fixed" else {model.name: model.generation}

    def _check_engines(self) -> None:
        if not self._mixtures:
            raise XloomError(
                "unsupported_by_backend",
                "These engines were started without mixtures, so requests can't mix adapters.",
                "Set engine.enable_xlora: true, with engine.backend vllm or transformers, and start again.",
            )

    @contextmanager
    def using(self, adapter: AdapterRef) -> Iterator[None]:
        """Within it, a mixture gives way to no other."""
        self._in_use[adapter.name] += 1
        try:
            yield
        finally:
            self._in_use[adapter.name] -= 1
            self._lately.add(adapter.name)
            if not self._in_use[adapter.name]:
                del self._in_use[adapter.name]

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            there = self._manifest.of_requests
            self._held &= {entry.key for entry in there}
            used, self._lately = self._lately | set(self._in_use), set()
            self._told = {name: at for name, at in self._told.items() if any(name == entry.name for entry in there)}
            if not there and not used:
                continue
            began = time.monotonic()
            try:
                await self._store.keep(sorted(used), self._limits.idle_s)
                self._told |= dict.fromkeys(used, began)
            except Exception as error:
                self._lately |= used
                logger.warning("the adapter store does not answer, serving goes on: %s", error)


class WeightedRequests:
    """ASGI middleware, behind the one that reads bodies: requests with weights wait for what they are served with."""

    def __init__(self, app: App, mixtures: RequestMixtures) -> None:
        self._app, self._mixtures = app, mixtures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = sent() if scope["type"] == "http" and scope["method"] == "POST" else None
        if asked is None or scope["path"].rstrip("/") not in ROUTES:
            await self._app(scope, receive, send)
            return
        try:
            adapter = await self._mixtures.adapter_for(asked)
        except XloomError as error:
            await send_error(send, error)
            return
        serve_with(adapter)
        with self._mixtures.using(adapter) if adapter is not None else contextlib.nullcontext():
            await self._app(scope, receive, send)
