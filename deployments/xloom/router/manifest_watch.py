"""The router's live copy of what the store wants served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from xloom.adapters.manifest import Entry, Manifest
from xloom.deadline import limited
from xloom.protocol import AdapterRef

logger = logging.getLogger(__name__)

POLL_S = 10.0  # one long poll
RETRY_S = 1.0


class Store(Protocol):
    """The part of `xloom.adapters.client.StoreClient` used here."""

    async def desired(self, known_version: int, timeout_s: float) -> Manifest: ...


class ManifestWatch:
    """Follows the store's manifest; the last copy stays in force while the store is away."""

    def __init__(self, store: Store, on_change: Callable[[Manifest], None]) -> None:
        self._store = store
        self._on_change = on_change
        self._manifest = Manifest(version=-1)
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The adapters, bundles and mixtures served by name."""
        return self._manifest.named

    @property
    def of_requests(self) -> tuple[Entry, ...]:
        """What requests asked for by weights."""
        return tuple(self._manifest.of_requests.values())

    def entry(self, name: str) -> Entry | None:
        """The entry of a name."""
        return self._manifest.get(name)

    async def start(self, timeout_s: float) -> None:
        """Begin to follow; waits for the first copy."""
        self._task = asyncio.create_task(self._follow())
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self._manifest.version >= 0)

    def ref(self, name: str) -> AdapterRef | None:
        """What a name stands for now."""
        entry = self._manifest.get(name)
        return entry.ref if entry is not None else None

    async def wait_version(self, version: int, timeout_s: float) -> None:
        """Wait until the copy is of this version or a later one. Raises `XloomError` (no_answer), as the others do."""
        await self._until(lambda: self._manifest.version >= version, timeout_s)

    async def wait_for(self, name: str, generation: str | None, timeout_s: float) -> None:
        """Wait until the copy has an entry at a generation, or (None) has it no more."""

        def there() -> bool:
            entry = self._manifest.get(name)
            return entry is None if generation is None else entry is not None and entry.generation == generation

        await self._until(there, timeout_s)

    async def wait_gone(self, name: str, generation: str, timeout_s: float) -> None:
        """Wait until the copy has no entry at this generation; it may have another again."""

        def gone() -> bool:
            entry = self._manifest.get(name)
            return entry is None or entry.generation != generation

        await self._until(gone, timeout_s)

    async def _until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        async with (
            limited(timeout_s, "The adapter store", "telling this router of a change that was made"),
            self._changed,
        ):
            await self._changed.wait_for(holds)

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                manifest = await self._store.desired(self._manifest.version, POLL_S)
            except Exception as error:
                logger.warning("the adapter store does not answer, serving goes on: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if manifest.version != self._manifest.version:
                async with self._changed:
                    self._manifest = manifest
                    self._on_change(manifest)
                    self._changed.notify_all()
