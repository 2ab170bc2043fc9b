"""How the rest of xloom speaks to the adapter store: typed calls, its errors as `XloomError`, restarts ridden out."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.residency import Refusal, ReplicaReport
from xloom.adapters.source_rules import SourceRules
from xloom.adapters.store import AdapterStore
from xloom.protocol import NO_OVERRIDES, Overrides, XloomError
from xloom.settings import LogSettings

ACTOR_NAME = "xloom-adapter-store"
NAMESPACE = "xloom"
_PATIENCE_S = 30.0  # how long a dead store may take to come back
_RETRY_S = 0.2


class StoreClient:
    """A handle on the store actor. It may be pickled, and stays valid when the actor restarts.

    Every method raises the store's `XloomError`s, and store_unavailable (503) when the actor stays away.
    """

    def __init__(self, actor: Any, patience_s: float = _PATIENCE_S) -> None:
        self._actor = actor
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
        rules: SourceRules | None = None,
    ) -> Entry:
        """Take an adapter or bundle in; see `AdapterCatalog.add`."""
        return cast(Entry, await self._call("add", name, source, kind, overrides, replace, max_rank, verify, rules))

    async def remove(self, name: str) -> Entry | None:
        """Take an adapter out; its entry, None when the store died after removing it. Raises adapter_not_found."""
        return cast("Entry | None", await self._call("remove", name, gone="adapter_not_found"))

    async def revert(self, name: str, generation: str) -> Entry | None:
        """Undo an add; see `AdapterCatalog.revert`."""
        return cast("Entry | None", await self._call("revert", name, generation))

    async def entries(self) -> tuple[Entry, ...]:
        """All adapters and bundles."""
        return cast("tuple[Entry, ...]", await self._call("entries"))

    async def desired(self, known_version: int, timeout_s: float) -> Manifest:
        """The manifest: at once when its version is not the known one, else when it changes or the time is up."""
        return cast(Manifest, await self._call("desired", known_version, timeout_s))

    async def fetch(self, generation: str) -> dict[str, bytes]:
        """A generation's prepared files by name, through this node's object store."""
        deadline = time.monotonic() + self._patience_s
        fresh = False
        while True:
            [reference] = await self._call("fetch", generation, fresh)
            try:
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
        return cast("list[str]", await self._call("await_resident", name, generation, timeout_s))

    async def await_absent(self, name: str, generation: str, timeout_s: float) -> None:
        """Wait until no live replica holds an entry any more."""
        await self._call("await_absent", name, generation, timeout_s)

    def stop(self) -> None:
        """End the actor; what it holds stays on disk."""
        ray.kill(self._actor, no_restart=True)

    async def _call(self, method: str, *arguments: Any, gone: str | None = None) -> Any:
        """Call the actor until it answers. `gone` is the error code a repeated call gives when the first one worked."""
        deadline = time.monotonic() + self._patience_s
        repeated = False
        while True:
            try:
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
                if time.monotonic() > deadline:
                    raise _unavailable(error) from None
                repeated = True
                await asyncio.sleep(_RETRY_S)


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
) -> StoreClient:
    """Create the actor that owns a base model's folder, or find it: a cluster has one for each.

    `logs` is how it logs if it is new; one that is there goes on as it began.
    """
    folder = str(store_folder(path, base_source, base_revision))
    actor = (
        ray.remote(AdapterStore)
        .options(
            name=f"{ACTOR_NAME}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}",
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
        .remote(folder, base_source, max_rank, list(reserved_names), base_revision, logs)
    )
    client = StoreClient(actor)
    await client.entries()  # a folder that can't be used shows now
    return client


def _unavailable(error: BaseException) -> XloomError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return XloomError(
        "store_unavailable", f"The adapter store does not answer: {reason}", "See that xloom serve is running.", 503
    )
