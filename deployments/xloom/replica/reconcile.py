"""Keeps an engine's adapters at the store's desired state. A store that is away never stops serving."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from xloom.adapters.adapter_cache import AdapterCache
from xloom.adapters.manifest import Entry, Manifest
from xloom.adapters.residency import NOT_VERIFIED, Refusal
from xloom.deadline import limited
from xloom.engines.base import LLMBackend
from xloom.observability import table
from xloom.observability.recorder import RECORDER, Recorder
from xloom.protocol import AdapterRef, XloomError

logger = logging.getLogger(__name__)

POLL_S = 10.0  # one long poll
REPORT_S = 3.0  # and at once after a change
RETRY_S = 1.0  # after a failure that may pass; twice as long after each further one
MAX_RETRY_S = 60.0
TOLD_AFTER = 3  # such failures in a row
LOAD_S = 120.0  # an engine may have this long to take an adapter,
VERIFY_S = 600.0  # to prove one,
REMOVE_S = 60.0  # to let go of one
UNWANTED_S = 3.0  # a router may know of an adapter sooner than a replica, by so much
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
        """Wait for an adapter: True once it is resident, False when it was refused or the store has it no more."""

        def decided() -> bool:
            return ref in self._resident or ref in self._failed

        async with self._settled:
            while not decided():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(UNWANTED_S):
                        await self._settled.wait_for(lambda: decided() or ref in self._wanted)
                if not decided() and ref not in self._wanted:
                    return False
                await self._settled.wait_for(lambda: decided() or ref not in self._wanted)
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
        """See to each adapter that is not as wanted; one task for each, so that none blocks another."""
        for ref in [ref for ref in self._failed if ref not in self._wanted]:
            del self._failed[ref]
        for ref in {*self._wanted, *self._resident}:
            if ref not in self._work and not self._is_as_wanted(ref):
                self._work[ref] = asyncio.create_task(self._follow(ref))

    def _is_as_wanted(self, ref: AdapterRef) -> bool:
        refused = ref in self._failed and self._failed[ref].verdict
        return refused or (ref in self._wanted) == (ref in self._resident)

    async def _follow(self, ref: AdapterRef) -> None:
        """Load or unload one adapter until the engine is as wanted, however often that changes meanwhile."""
        try:
            while not self._is_as_wanted(ref):
                if ref in self._wanted:
                    await self._load(ref)
                else:
                    await self._unload(ref)
        finally:  # at once: whoever wants it otherwise from now on finds no work under way
            self._work.pop(ref, None)

    async def _load(self, ref: AdapterRef) -> None:
        """Try until it is resident, refused or wanted no more."""
        began, tries = time.monotonic(), 0
        while (entry := self._wanted.get(ref)) is not None:
            why = await self._try(entry)
            if why is None:
                self._failed.pop(ref, None)
                self._resident.add(ref)
                self._recorder.inc(table.ADAPTER_SWAPS, model=ref.label, action="load")
                self._recorder.observe(table.ADAPTER_LOAD, time.monotonic() - began, model=ref.label)
                logger.info("adapter %s is resident, generation %s", ref.name, ref.generation[:12])
                await self._notify()
                return
            tries += 1
            if why.verdict or tries >= TOLD_AFTER:
                await self._refuse(ref, why)
            if why.verdict:
                return
            await self._change_of_wants(min(RETRY_S * 2 ** min(tries - 1, 10), MAX_RETRY_S))

    async def _try(self, entry: Entry) -> Refusal | None:
        """One attempt; None when the engine holds it."""
        try:
            path = await self._cache.ensure(entry, self._store.fetch)
            async with limited(VERIFY_S if entry.verify else LOAD_S, "The engine", f"loading {entry.name!r}"):
                await self._add_to_engine(entry, path)
        except XloomError as error:
            logger.warning("adapter %s is not loaded: %s", entry.name, error)
            return Refusal(error.code, str(error), verdict=error.status < 500)
        except Exception as error:
            logger.exception("adapter %s could not be loaded", entry.name)
            return Refusal("internal_error", f"{type(error).__name__}: {error}", verdict=False)
        return None

    async def _add_to_engine(self, entry: Entry, path: Path) -> None:
        if not entry.verify:
            await self._backend.add_adapter(entry.ref, path)
        elif self.admit is not None:
            await self.admit(entry.ref, path)
        else:
            raise XloomError(NOT_VERIFIED, f"This replica can't verify {entry.name!r}.", "Add it without verify.")

    async def _refuse(self, ref: AdapterRef, why: Refusal) -> None:
        if ref not in self._wanted or self._failed.get(ref) == why:
            return
        if ref not in self._failed:
            self._recorder.inc(table.ADAPTER_SWAPS, model=ref.label, action="refused")
        self._failed[ref] = why
        await self._notify()

    async def _unload(self, ref: AdapterRef) -> None:
        while self.users(ref):  # running requests finish with the adapter they began with
            if ref in self._wanted:
                return
            await asyncio.sleep(IN_USE_POLL_S)
        self._resident.discard(ref)
        try:
            async with limited(REMOVE_S, "The engine", f"removing {ref.name!r}"):
                await self._backend.remove_adapter(ref)
        except Exception:
            logger.exception("adapter %s could not be removed", ref.name)
        self._recorder.inc(table.ADAPTER_SWAPS, model=ref.label, action="remove")
        if not any(other.generation == ref.generation for other in (*self._resident, *self._wanted)):
            self._cache.release(ref.generation)
        await self._notify()

    async def _change_of_wants(self, timeout_s: float) -> None:
        """Wait for the store to want something else, for so long."""
        version = self._version
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._settled:
                await self._settled.wait_for(lambda: self._version != version)

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
