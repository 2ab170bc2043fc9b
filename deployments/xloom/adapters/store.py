"""The adapter store: a Ray actor that holds the desired state and hands out weights through the object store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from xloom.adapters.catalog import AdapterCatalog
from xloom.adapters.identity import identity_of
from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.request_mixtures import Uses, request_mixture_name
from xloom.adapters.residency import NOT_VERIFIED, Refusal, ReplicaReport, Residency
from xloom.adapters.source_rules import SourceRules
from xloom.observability import table
from xloom.observability.logs import configure
from xloom.observability.recorder import RECORDER
from xloom.protocol import KINDS, NO_OVERRIDES, Blend, Overrides, XloomError, adapter_key
from xloom.settings import forget_keys
from xloom.watchdog import Watchdog

if TYPE_CHECKING:
    from ray import ObjectRef

    from xloom.settings import LogSettings

logger = logging.getLogger(__name__)

_MAX_STAGING = 4  # sources fetched and checked at once
_MAX_SHARED = 2 * 2**30  # bytes kept in Ray's object store for replicas to come
_SETTLE_S = 3.0  # after a start, replicas have this long to report before their absence means anything


class AdapterStore:
    """The actor's class; `xloom.adapters.client` makes it an actor and speaks to it.

    Memory holds only what can be had again: the catalog is on disk, replicas report anew, objects are put anew.
    """

    def __init__(
        self,
        folder: str,
        base_source: str,
        max_rank: int,
        reserved_names: Sequence[str],
        base_revision: str | None,
        logs: LogSettings | None = None,
        stuck_timeout_s: float = 10.0,
    ) -> None:
        forget_keys()
        self._watchdog = Watchdog(stuck_timeout_s)
        if logs is not None:
            configure(logs, "store", "store")
        self._identity = identity_of(
            folder, base_source, max_rank, list(reserved_names), base_revision, logs, stuck_timeout_s
        )
        self._arguments = (Path(folder), base_source, max_rank, tuple(reserved_names), base_revision)
        self._opened: AdapterCatalog | None = None
        self._opening = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._committing = asyncio.Lock()
        self._staging = asyncio.Semaphore(_MAX_STAGING)
        self._residency = Residency()
        self._uses = Uses()  # of what requests asked for by weights
        self._gathering = asyncio.Lock()
        self._shared: OrderedDict[str, tuple[ObjectRef, int]] = OrderedDict()  # generation -> reference, bytes
        self._sharing = asyncio.Lock()
        self._mending = asyncio.Lock()
        self._started = time.monotonic()
        RECORDER.start()

    def identity(self) -> str:
        """Its `identity_of`."""
        return self._identity

    # Desired state.

    async def add(
        self,
        name: str,
        source: str,
        kind: str | None = None,
        overrides: Overrides = NO_OVERRIDES,
        replace: bool = False,
        max_rank: int | None = None,
        verify: bool = False,
        configured: bool = False,
        mixtures: bool = True,
        rules: SourceRules | None = None,
        blend: Blend | None = None,
        expires_at: float | None = None,
    ) -> Entry:
        """Take an adapter or bundle in; see `AdapterCatalog.add` and `.commit`.

        A change is not made after `expires_at` (seconds since the epoch), when its caller has given it up: raises
        `XloomError` (store_unavailable).
        """
        catalog = await self._catalog()
        with _counted("add", catalog):
            async with self._staging:
                flags = {"verify": verify, "configured": configured}
                stage = catalog.stage(name, source, kind, overrides, **flags, rules=rules, blend=blend)
                staged = await asyncio.to_thread(stage.__enter__)
                try:
                    async with self._committing:
                        _in_time(expires_at)
                        entry = await asyncio.to_thread(
                            catalog.commit, staged, replace=replace, max_rank=max_rank, mixtures=mixtures
                        )
                finally:
                    await asyncio.to_thread(stage.__exit__, None, None, None)
        logger.info("%s %s is in the store, generation %s", entry.kind, entry.name, entry.generation[:12])
        await self._wake()
        return entry

    async def gather(
        self, parts: Mapping[str, str], max_rank: int, most: int, expires_at: float | None = None
    ) -> Entry:
        """What requests with weights use of these entries (name -> generation): what is there, or made now.

        At most so many are kept. Raises `XloomError`: adapter_superseded, rank_too_large, mixtures_busy.
        """
        catalog, name = await self._catalog(), request_mixture_name(parts)
        self._uses.mark([name])
        if (there := catalog.manifest.get(name)) is not None:
            return there
        async with self._gathering:
            if (there := catalog.manifest.get(name)) is not None:  # meanwhile, for another
                return there
            self._uses.to_give_way(catalog.manifest.of_requests, most)  # before the work
            stage = catalog.gather(parts, max_rank)
            staged = await asyncio.to_thread(stage.__enter__)
            try:
                async with self._committing:
                    _in_time(expires_at)
                    gone = self._uses.to_give_way(catalog.manifest.of_requests, most)
                    await asyncio.to_thread(catalog.drop, gone)
                    entry = await asyncio.to_thread(catalog.commit, staged, replace=True, max_rank=max_rank)
            finally:
                await asyncio.to_thread(stage.__exit__, None, None, None)
        logger.info("requests mix %s: generation %s", entry.source, entry.generation[:12])
        await self._wake()
        return entry

    async def keep(self, names: Sequence[str], idle_s: float) -> None:
        """A router says which requests of its use, and how long what no router uses is kept."""
        catalog = await self._catalog()
        self._uses.mark(names)
        if gone := self._uses.idle(catalog.manifest.of_requests, idle_s):
            async with self._committing:
                await asyncio.to_thread(catalog.drop, gone)
            await self._wake()

    async def remove(self, name: str, expires_at: float | None = None) -> Entry:
        """Take an adapter out, by `expires_at` as with `add`. Raises `XloomError` (adapter_not_found)."""
        catalog = await self._catalog()
        with _counted("remove", catalog):
            async with self._committing:
                _in_time(expires_at)
                entry = await asyncio.to_thread(catalog.remove, name)
        logger.info("%s is out of the store", name)
        await self._wake()
        return entry

    async def revert(self, name: str, generation: str, expires_at: float | None = None) -> Entry | None:
        """Undo an add, by `expires_at` as with `add`; see `AdapterCatalog.revert`."""
        catalog = await self._catalog()
        with _counted("revert", catalog):
            async with self._committing:
                _in_time(expires_at)
                entry = await asyncio.to_thread(catalog.revert, name, generation)
        logger.info("%s is taken back, generation %s", name, generation[:12])
        await self._wake()
        return entry

    async def prune(self, names: Sequence[str], expires_at: float | None = None) -> list[Entry]:
        """Take out what left the settings file; see `AdapterCatalog.prune`, and `add` for `expires_at`."""
        catalog = await self._catalog()
        with _counted("prune", catalog):
            async with self._committing:
                _in_time(expires_at)
                left = await asyncio.to_thread(catalog.prune, frozenset(names))
        for entry in left:
            logger.info("%s is out of the store: the settings name it no more", entry.name)
        await self._wake()
        return left

    async def entries(self) -> tuple[Entry, ...]:
        """All adapters and bundles."""
        return (await self._catalog()).entries()

    async def desired(self, known_version: int, timeout_s: float) -> Manifest:
        """The manifest: at once when its version is not the known one, else when it changes or the time is up."""
        catalog = await self._catalog()
        await self._until(lambda: catalog.version != known_version, timeout_s)
        return catalog.manifest

    # Weights.

    async def fetch(self, generation: str, fresh: bool = False) -> list[ObjectRef]:
        """`[reference]` to a generation's files, `dict[str, bytes]`: in a list, so that Ray does not resolve it.

        `fresh` puts them anew, for callers whose reference was lost; what is damaged on disk is fetched from its source
        again. Raises `XloomError` (generation_not_found, generation_damaged).
        """
        catalog = await self._catalog()
        try:
            return [await self._share(catalog, generation, fresh)]
        except XloomError as error:
            if error.code != "generation_damaged":
                raise
        async with self._mending:
            try:
                return [await self._share(catalog, generation, fresh)]  # mended meanwhile, for another one
            except XloomError as error:
                if error.code != "generation_damaged":
                    raise
                logger.warning("%s", error.message)
            await asyncio.to_thread(catalog.mend, generation)
        return [await self._share(catalog, generation, fresh)]

    async def _share(self, catalog: AdapterCatalog, generation: str, fresh: bool) -> ObjectRef:
        async with self._sharing:
            if generation in self._shared and not fresh:
                self._shared.move_to_end(generation)
                shared, size = self._shared[generation]
                _count_fetch("hit", size)
                return shared
            files = await asyncio.to_thread(catalog.files, generation)
            reference = await asyncio.to_thread(ray.put, files)
            handed = sum(map(len, files.values()))
            _count_fetch("miss", handed)
            self._shared[generation] = (reference, handed)
            self._shared.move_to_end(generation)
            named = {entry.generation for entry in catalog.manifest.entries}
            total = sum(size for _, size in self._shared.values())
            for old, (_, size) in list(self._shared.items()):
                if old != generation and (old not in named or total > _MAX_SHARED):
                    del self._shared[old]  # the object lives on while a borrower holds its reference
                    total -= size
            RECORDER.set(table.STORE_SHARED_BYTES, total)
            return reference

    # Residency.

    async def report(
        self, replica_id: str, node_id: str, resident: Sequence[str], failed: dict[str, Refusal] | None = None
    ) -> None:
        """A replica says what it holds (name@generation), and what its engine refused and why. Each second or so."""
        self._watchdog.ensure()
        self._residency.report(replica_id, node_id, resident, failed or {})
        await self._wake()

    async def forget(self, replica_id: str) -> None:
        """A replica that is shutting down says so, and is waited for no more."""
        self._residency.forget(replica_id)
        await self._wake()

    async def residency(self) -> dict[str, ReplicaReport]:
        """The last report of each replica heard within ten seconds."""
        return self._residency.live()

    async def await_resident(self, name: str, generation: str, timeout_s: float) -> list[str]:
        """Wait until each live replica holds an entry; returns their ids, none when no replica is up.

        Raises `XloomError`: adapter_load_failed (an engine refused it), adapter_not_verified (it did not pass its
        proof), adapter_superseded (it was replaced or removed meanwhile), adapter_not_resident (time is up).
        """
        catalog = await self._catalog()
        key = adapter_key(name, generation)

        def settled() -> bool:
            entry = catalog.manifest.get(name)
            if entry is None or entry.generation != generation:
                raise XloomError("adapter_superseded", f"{name!r} was replaced or removed meanwhile.", status=409)
            if failures := self._residency.failures(key):
                replica, refusal = next(iter(failures.items()))
                unproved, broken = refusal.code == NOT_VERIFIED, refusal.code == "internal_error"
                raise XloomError(
                    NOT_VERIFIED if unproved else "adapter_load_failed",
                    f"{len(failures)} replicas could not load {name!r}; {replica}: {refusal.reason}",
                    "Mend the adapter, then replace it; or remove it.",
                    500 if broken else 422,
                )
            return self._settled() and not self._residency.lacking(key)

        if not await self._until(settled, timeout_s):
            raise self._late(name, "load", self._residency.lacking(key), timeout_s)
        return self._residency.holding(key)

    async def await_held(self, name: str, generation: str, timeout_s: float) -> None:
        """Wait until one live replica holds an entry; not at all where no replica is up.

        Raises `XloomError` as `await_resident`; one that refused it counts where no other holds it.
        """
        catalog = await self._catalog()
        key, source = adapter_key(name, generation), ""

        def held() -> bool:
            nonlocal source
            entry = catalog.manifest.get(name)
            if entry is None or entry.generation != generation:
                what = "Of the adapters that the request mixes one was replaced or removed meanwhile."
                raise XloomError("adapter_superseded", what, "Send it again.", 409)
            source = entry.source
            if not self._residency.live():
                return self._settled()
            if self._residency.holding(key):
                return True
            if failures := self._residency.failures(key):
                replica, refusal = next(iter(failures.items()))
                message = f"The replica {replica} could not load {source}: {refusal.reason}"
                raise XloomError("adapter_load_failed", message, "See `xloom status`.", 500)
            return False

        if not await self._until(held, timeout_s):
            what = f"No replica has loaded {source} together within {timeout_s:g} s."
            raise XloomError("adapter_not_resident", what, "Retry: they go on.", 504)

    async def await_absent(self, name: str, generation: str, timeout_s: float) -> None:
        """Wait until no live replica holds an entry any more, or it is wanted again.

        Raises `XloomError` (adapter_not_resident).
        """
        catalog = await self._catalog()
        key = adapter_key(name, generation)

        def gone() -> bool:
            entry = catalog.manifest.get(name)
            wanted = entry is not None and entry.generation == generation
            return wanted or (self._settled() and not self._residency.holding(key))

        if not await self._until(gone, timeout_s):
            raise self._late(name, "let go of", self._residency.holding(key), timeout_s)

    # Inside.

    def _settled(self) -> bool:
        return time.monotonic() - self._started >= _SETTLE_S or bool(self._residency.live())

    @staticmethod
    def _late(name: str, verb: str, replicas: list[str], timeout_s: float) -> XloomError:
        return XloomError(
            "adapter_not_resident",
            f"{len(replicas)} replicas did not {verb} {name!r} within {timeout_s:g} s: {', '.join(replicas)}.",
            "They go on trying: look at xloom status, and at their logs.",
            504,
        )

    async def _catalog(self) -> AdapterCatalog:
        # Opened here and not in __init__, where an error would kill the actor and reach callers without its code.
        async with self._opening:
            if self._opened is None:
                self._opened = await asyncio.to_thread(AdapterCatalog, *self._arguments)
                _show(self._opened)
                RECORDER.set(table.STORE_SHARED_BYTES, 0)
            return self._opened

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for a condition; looked at after each change, and each second, since silence changes things too."""
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while not holds():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                try:
                    await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
                except TimeoutError:
                    continue
        return True


def _in_time(expires_at: float | None) -> None:
    """Raise when whoever asked for a change has been told by now that it was not made."""
    if expires_at is not None and time.time() > expires_at:
        raise XloomError("store_unavailable", "The adapter store was too slow: the change was not made.", "Retry.", 503)


@contextmanager
def _counted(action: str, catalog: AdapterCatalog) -> Iterator[None]:
    """A change asked of the store, counted with what becomes of it."""
    outcome = "internal_error"
    try:
        yield
        outcome = "ok"
    except XloomError as error:
        outcome = error.code
        raise
    finally:
        RECORDER.inc(table.STORE_CHANGES, action=action, outcome=outcome)
        _show(catalog)


def _count_fetch(outcome: str, size: int) -> None:
    RECORDER.inc(table.STORE_FETCHES, outcome=outcome)
    RECORDER.inc(table.STORE_FETCHED_BYTES, size)


def _show(catalog: AdapterCatalog) -> None:
    kinds = [entry.kind for entry in catalog.entries()]
    for kind in KINDS:
        RECORDER.set(table.STORE_ENTRIES, kinds.count(kind), kind=kind)
    RECORDER.set(table.STORE_VERSION, catalog.version)
