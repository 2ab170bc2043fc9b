"""How the rest of xloom speaks to the adapter store: typed calls, its errors as `XloomError`, restarts ridden out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from xloom.adapters.identity import identity_of
from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.residency import Refusal, ReplicaReport
from xloom.adapters.source_rules import SourceRules
from xloom.adapters.store import AdapterStore
from xloom.deadline import limited
from xloom.protocol import NO_OVERRIDES, Blend, Overrides, XloomError
from xloom.settings import LogSettings

logger = logging.getLogger(__name__)

ACTOR_NAME = "xloom-adapter-store"
NAMESPACE = "xloom"
_PATIENCE_S = 30.0  # how long a dead store may take to come back, and a call that waits for nothing else may take
_ADD_S = 900.0  # what an add or a fetch may take: a source is read, over a network
_PREPARE_S = 300.0  # of that, beyond what its source may take
_GRACE_S = 5.0  # beyond which a change is not made any more: for its answer, and for clocks that differ
_RETRY_S = 0.2


class _NoAnswer(XloomError):
    """What was asked may have been done, or not."""

    def __init__(self, reason: str) -> None:
        cure = "One that is stuck or has died is started anew; see its log."
        super().__init__("store_unavailable", f"The adapter store is away. {reason}.", cure, 503)


class StoreClient:
    """A handle on the store actor. It may be pickled, and stays valid when the actor restarts.

    Every method raises the store's `XloomError`s, and store_unavailable (503) when the actor stays away or does not
    answer in time. A change that was given up is not made later.
    """

    def __init__(self, actor: Any, patience_s: float = _PATIENCE_S, named: tuple[str, str] | None = None) -> None:
        self._actor = actor
        self._named = named  # the actor's name and namespace: a deployment may have replaced it
        self._patience_s = patience_s

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
        configured: bool = False,
        mixtures: bool = True,
        rules: SourceRules | None = None,
        blend: Blend | None = None,
    ) -> Entry:
        """Take an adapter or bundle in; see `AdapterCatalog.add` and `.commit`."""
        limit_s = max(_ADD_S, rules.limits.seconds + _PREPARE_S) if rules is not None else _ADD_S
        arguments = (name, source, kind, overrides, replace, max_rank, verify, configured, mixtures, rules, blend)
        return cast(Entry, await self._change("add", *arguments, limit_s=limit_s))

    async def gather(self, parts: Mapping[str, str], max_rank: int, most: int) -> Entry:
        """What requests with weights use of these entries; see `AdapterStore.gather`."""
        return cast(Entry, await self._change("gather", dict(parts), max_rank, most, limit_s=_PREPARE_S))

    async def keep(self, names: Sequence[str], idle_s: float) -> None:
        """Say which mixtures of requests are in use; see `AdapterStore.keep`."""
        await self._call("keep", list(names), idle_s)

    async def remove(self, name: str) -> Entry | None:
        """Take an adapter out; its entry, None when the store died after removing it. Raises adapter_not_found."""
        return cast("Entry | None", await self._change("remove", name, gone="adapter_not_found"))

    async def revert(self, name: str, generation: str) -> Entry | None:
        """Undo an add; see `AdapterCatalog.revert`."""
        return cast("Entry | None", await self._change("revert", name, generation))

    async def prune(self, names: Sequence[str]) -> list[Entry]:
        """Take out what left the settings file; see `AdapterCatalog.prune`."""
        return cast("list[Entry]", await self._change("prune", list(names)))

    async def entries(self) -> tuple[Entry, ...]:
        """All adapters and bundles."""
        return cast("tuple[Entry, ...]", await self._call("entries"))

    async def desired(self, known_version: int, timeout_s: float) -> Manifest:
        """The manifest: at once when its version is not the known one, else when it changes or the time is up."""
        return cast(Manifest, await self._call("desired", known_version, timeout_s, wait_s=timeout_s))

    async def fetch(self, generation: str) -> dict[str, bytes]:
        """A generation's prepared files by name, through this node's object store."""
        deadline = time.monotonic() + self._patience_s
        fresh = False
        while True:
            [reference] = await self._call("fetch", generation, fresh, wait_s=_ADD_S)
            try:
                async with limited(_ADD_S, "Ray's object store", f"generation {generation[:12]}"):
                    return cast("dict[str, bytes]", await reference)
            except (ObjectLostError, RayActorError, GetTimeoutError) as error:
                # OwnerDiedError is an ObjectLostError: the store died after it had put the object.
                if time.monotonic() > deadline:
                    raise _unavailable(error) from None
                fresh = True
                await asyncio.sleep(_RETRY_S)

    async def report(
        self, replica_id: str, node_id: str, resident: Sequence[str], failed: dict[str, Refusal] | None = None
    ) -> None:
        """Say what a replica holds (name@generation), and what its engine refused and why."""
        await self._call("report", replica_id, node_id, list(resident), failed)

    async def forget(self, replica_id: str) -> None:
        """Say that a replica is shutting down."""
        await self._call("forget", replica_id)

    async def residency(self) -> dict[str, ReplicaReport]:
        """The last report of each replica heard within ten seconds."""
        return cast("dict[str, ReplicaReport]", await self._call("residency"))

    async def await_resident(self, name: str, generation: str, timeout_s: float) -> list[str]:
        """Wait until each live replica holds an entry; returns their ids. See `AdapterStore.await_resident`."""
        return cast("list[str]", await self._call("await_resident", name, generation, timeout_s, wait_s=timeout_s))

    async def await_held(self, name: str, generation: str, timeout_s: float) -> None:
        """Wait until one live replica holds an entry. See `AdapterStore.await_held`."""
        await self._call("await_held", name, generation, timeout_s, wait_s=timeout_s)

    async def await_absent(self, name: str, generation: str, timeout_s: float) -> None:
        """Wait until no live replica holds an entry any more."""
        await self._call("await_absent", name, generation, timeout_s, wait_s=timeout_s)

    def stop(self) -> None:
        """End the actor; what it holds stays on disk."""
        ray.kill(self._actor, no_restart=True)

    async def _change(self, method: str, *arguments: Any, limit_s: float | None = None, gone: str | None = None) -> Any:
        """Call what changes the store: it is told until when that may be."""
        limit_s = self._patience_s if limit_s is None else limit_s
        expires_at = time.time() + limit_s
        try:
            return await self._call(method, *arguments, expires_at, wait_s=limit_s, grace_s=_GRACE_S, gone=gone)
        except _NoAnswer as error:
            raise XloomError(
                error.code,
                f"{error.message} The change ({method} {arguments[0]!r}) is not made any more; whether it was made "
                "before, the list of adapters says once the store is back.",
                error.cure,
                error.status,
            ) from None

    async def _call(
        self,
        method: str,
        *arguments: Any,
        wait_s: float = 0.0,
        grace_s: float | None = None,
        gone: str | None = None,
    ) -> Any:
        """Call the actor until it answers, or stays away, or the time is up: what it may wait itself and some grace.

        `gone` is the error code a repeated call gives when the first one worked.
        """
        limit_s = wait_s + (self._patience_s if grace_s is None else grace_s)
        deadline = time.monotonic() + limit_s
        away_since: float | None = None
        repeated = False
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, deadline - began)) as limit:
                    return await getattr(self._actor, method).remote(*arguments)
            except RayTaskError as error:
                # An error of another kind than XloomError is a fault of the store: it stays as it is.
                cause = error.cause
                if not isinstance(cause, XloomError):
                    raise
                if repeated and cause.code == gone:
                    return None
                raise cause from None
            except RayActorError as error:
                now = time.monotonic()
                if away_since is None or now - began > self._patience_s:  # it was back, and worked on this call
                    away_since = now
                if now - away_since > self._patience_s or now > deadline:
                    raise _unavailable(error) from None
                repeated = True
                await asyncio.sleep(_RETRY_S)
                if self._named is not None:
                    with contextlib.suppress(ValueError):  # there is none of the name at the moment
                        self._actor = await asyncio.to_thread(ray.get_actor, *self._named)
            except TimeoutError:
                if not limit.expired():
                    raise
                raise _NoAnswer(f"It did not answer {method!r} within {limit_s:g} s") from None


def store_folder(path: str, base_source: str, base_revision: str | None = None) -> Path:
    """The folder of one base model's store below `store.path`: adapters of different bases never meet."""
    tail = re.sub(r"[^A-Za-z0-9._-]+", "-", base_source.rstrip("/").rpartition("/")[2])[:40].strip("-.") or "base"
    digest = hashlib.sha256(f"{base_source}\0{base_revision or ''}".encode()).hexdigest()
    return Path(path).expanduser() / f"{tail}-{digest[:12]}"


async def open_store(
    path: str,
    base_source: str,
    *,
    max_rank: int = 256,
    reserved_names: Sequence[str] = (),
    base_revision: str | None = None,
    namespace: str = NAMESPACE,
    logs: LogSettings | None = None,
    stuck_timeout_s: float = 10.0,
) -> StoreClient:
    """Create the actor that owns a base model's folder, or find it: a cluster has one for each.

    One that runs other code, or was told something else, is replaced; what it holds is on disk, and clients of it
    find the new one by its name. `logs` is how it logs, and `stuck_timeout_s` how long it may be stopped before it is
    started anew.
    """
    folder = str(store_folder(path, base_source, base_revision))
    arguments = (folder, base_source, max_rank, list(reserved_names), base_revision, logs, stuck_timeout_s)
    named = (f"{ACTOR_NAME}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}", namespace)
    await _end_another(named, await asyncio.to_thread(identity_of, *arguments))
    actor = (
        ray.remote(AdapterStore)
        .options(
            name=named[0],
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            # On the head, where its disk is: without CPUs it may be placed anywhere. HEAD_NODE_RESOURCE_NAME, Ray 2.60.
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            # Calls that died with the actor are repeated by StoreClient, which knows what repeating one means.
            max_task_retries=0,
        )
        .remote(*arguments)
    )
    client = StoreClient(actor, named=named)
    await client.entries()  # a folder that can't be used shows now
    return client


async def _end_another(named: tuple[str, str], identity: str) -> None:
    """End the actor of this name if it is not what one made now would be. Raises `XloomError` (store_unavailable)."""
    deadline = time.monotonic() + _PATIENCE_S
    ended = False
    while True:
        try:
            actor = await asyncio.to_thread(ray.get_actor, *named)
        except ValueError:
            return
        if not ended:
            with contextlib.suppress(AttributeError, RayActorError):  # of a release without the method; one that died
                if await asyncio.wait_for(actor.identity.remote(), _PATIENCE_S) == identity:
                    return
            logger.warning("the adapter store runs other code or other settings: it is replaced")
            ray.kill(actor, no_restart=True)
            ended = True
        if time.monotonic() > deadline:
            raise _unavailable(TimeoutError("it does not end, and can't be replaced"))
        await asyncio.sleep(_RETRY_S)


def _unavailable(error: BaseException) -> _NoAnswer:
    return _NoAnswer((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))
