"""Keeps an engine's adapters at the store's desired state. A store that is away never stops serving."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Protocol

from xloom.adapters.adapter_cache import AdapterCache
from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.residency import NOT_VERIFIED, Refusal
from xloom.engines.base import LLMBackend
from xloom.observability import table
from xloom.observability.recorder import RECORDER, Recorder
from xloom.protocol import AdapterRef, XloomError

logger = logging.getLogger(__name__)

POLL_S = 10.0  # one long poll
REPORT_S = 3.0  # and at once after a change
RETRY_S = 1.0  # after a failure that may pass
IN_USE_POLL_S = 0.05


class Store(Protocol):
    """The part of `xloom.adapters.client.StoreClient` used here."""

    async def desired(self, known_version: int, timeout_s: float) -> Manifest: ...
    async def fetch(self, generation: str) -> dict[str, bytes]: ...
    async def report(
        self, replica_id: str, node_id: str, resident: list[str], failed: dict[str, Refusal] | None = None
    ) -> None: ...
    async def forget(self, replica_id: str) -> None: ...


class Reconciler:
    """Loads what the store wants and the engine lacks, and removes what it wants no more once no request uses it."""

    def __init__(
        self,
        backend: LLMBackend,
        store: Store,
        cache: AdapterCache,
        replica_id: str,
        node_id: str,
        recorder: Recorder = RECORDER,
    ) -> None:
        self._backend, self._store, self._cache = backend, store, cache
        self._replica_id, self._node_id, self._recorder = replica_id, node_id, recorder
        self.users: Callable[[AdapterRef], int] = lambda ref: 0
        self.on_change: Callable[[], None] = lambda: None
        self.admit: Callable[[AdapterRef, Path], Awaitable[None]] | None = None  # loads and proves; raises `XloomError`
        self._version = -1
        self._wanted: dict[AdapterRef, Entry] = {}
        self._resident: set[AdapterRef] = set()
        self._failed: dict[AdapterRef, Refusal] = {}
        self._work: dict[AdapterRef, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._unreported = asyncio.Event()  # something to report
        self._settled = asyncio.Condition()

    @property
    def resident(self) -> set[AdapterRef]:
        """What the engine holds."""
        return self._resident

    async def start(self, first_timeout_s: float) -> None:
        """Begin, and wait until everything wanted now is resident or refused, or the time is up."""
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._report())]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(first_timeout_s), self._settled:
                await self._settled.wait_for(self._is_settled)

    def _is_settled(self) -> bool:
        return self._version >= 0 and all(ref in self._resident or ref in self._failed for ref in self._wanted)

    async def arrival(self, ref: AdapterRef) -> bool:
        """Wait for an adapter: True once it is resident, False when the engine refused it."""
        async with self._settled:
            await self._settled.wait_for(lambda: ref in self._resident or ref in self._failed)
        return ref in self._resident

    async def close(self) -> None:
        """Stop, and let the store and the node's cache know."""
        tasks = [*self._tasks, *self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self._store.forget(self._replica_id)
        self._cache.close()

    async def _watch(self) -> None:
        while True:
            try:
                manifest = await self._store.desired(self._version, POLL_S)
            except Exception as error:
                logger.warning("the adapter store does not answer, serving goes on: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if manifest.version != self._version:
                self._version = manifest.version
                self._wanted = {entry.ref: entry for entry in manifest.entries}
                self._reconcile()
                await self._notify()

    def _reconcile(self) -> None:
        """Load what is missing, unload what is not wanted; one task per adapter, so that none blocks another."""
        for ref in [ref for ref in self._failed if ref not in self._wanted]:
            del self._failed[ref]
        for ref, entry in self._wanted.items():
            if ref not in self._resident and ref not in self._failed:
                self._begin(ref, self._load(entry))
            elif ref in self._resident and ref in self._work:
                self._work.pop(ref).cancel()  # wanted again before it was unloaded
        for ref in [*self._resident, *self._work]:
            if ref not in self._wanted and ref in self._resident and ref not in self._work:
                self._begin(ref, self._unload(ref))

    def _begin(self, ref: AdapterRef, work: Coroutine[None, None, None]) -> None:
        if ref in self._work:
            work.close()
            return
        task = asyncio.create_task(work)
        self._work[ref] = task
        task.add_done_callback(lambda done: self._work.pop(ref, None) if self._work.get(ref) is done else None)

    async def _load(self, entry: Entry) -> None:
        ref, began = entry.ref, time.monotonic()
        while ref in self._wanted:
            try:
                path = await self._cache.ensure(entry, self._store.fetch)
                await self._add_to_engine(entry, path)
            except XloomError as error:
                if error.status < 500:  # the engine's verdict on these files: it stays
                    logger.warning("adapter %s is refused: %s", ref.name, error)
                    self._refuse(ref, Refusal(error.code, str(error)))
                    break
                logger.warning("adapter %s is not loaded yet: %s", ref.name, error)
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                logger.exception("adapter %s could not be loaded", ref.name)
                self._refuse(ref, Refusal("internal_error", f"{type(error).__name__}: {error}"))
                break
            else:
                self._resident.add(ref)
                self._recorder.inc(table.ADAPTER_SWAPS, model=ref.name, action="load")
                self._recorder.observe(table.ADAPTER_LOAD, time.monotonic() - began, model=ref.name)
                logger.info("adapter %s is resident, generation %s", ref.name, ref.generation[:12])
                break
        await self._notify()
        if ref not in self._wanted and ref in self._resident:  # removed while it was being loaded
            await self._unload(ref)

    async def _add_to_engine(self, entry: Entry, path: Path) -> None:
        if not entry.verify:
            await self._backend.add_adapter(entry.ref, path)
        elif self.admit is not None:
            await self.admit(entry.ref, path)
        else:
            raise XloomError(NOT_VERIFIED, f"This replica can't verify {entry.name!r}.", "Add it without verify.")

    def _refuse(self, ref: AdapterRef, why: Refusal) -> None:
        self._failed[ref] = why
        self._recorder.inc(table.ADAPTER_SWAPS, model=ref.name, action="refused")

    async def _unload(self, ref: AdapterRef) -> None:
        while self.users(ref):  # running requests finish with the adapter they began with
            await asyncio.sleep(IN_USE_POLL_S)
        self._resident.discard(ref)
        try:
            await self._backend.remove_adapter(ref)
        except Exception:
            logger.exception("adapter %s could not be removed", ref.name)
        self._recorder.inc(table.ADAPTER_SWAPS, model=ref.name, action="remove")
        if not any(other.generation == ref.generation for other in self._resident):
            self._cache.release(ref.generation)
        await self._notify()

    async def _notify(self) -> None:
        """Something changed: wake those who wait, and report at once."""
        self._unreported.set()
        self.on_change()
        async with self._settled:
            self._settled.notify_all()

    async def _report(self) -> None:
        while True:
            self._unreported.clear()
            resident = sorted(ref.key for ref in self._resident)
            failed = {ref.key: why for ref, why in self._failed.items()}
            try:
                await self._store.report(self._replica_id, self._node_id, resident, failed)
            except Exception as error:
                logger.warning("the adapter store does not take reports, serving goes on: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._unreported.wait()
