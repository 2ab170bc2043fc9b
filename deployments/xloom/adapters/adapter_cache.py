"""The node's copies of prepared adapters: content-addressed, shared by all replicas of the node, checked before use."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from xloom.adapters.manifest import Entry, generation_of, read_files
from xloom.observability.recorder import RECORDER, Recorder
from xloom.observability.table import CACHE_READS
from xloom.protocol import XloomError
from xloom.storage.folder_cache import FolderCache

logger = logging.getLogger(__name__)

Fetch = Callable[[str], Awaitable[Mapping[str, bytes]]]  # generation -> its files by name

_GENERATION = re.compile(r"^[0-9a-f]{64}$")
_LOCK_POLL_S = 0.02
_USE, _WRITE = "use", "write"  # what a copy's two locks are for


class AdapterCache:
    """A folder of prepared adapters, `<generation>/`, each with two lock files beside it.

    A process that uses a copy holds `<generation>.use` shared, and who evicts it needs that one alone; who writes a
    copy holds `<generation>.write`. So the replicas of a node fetch a generation once, and nothing in use is evicted.
    """

    def __init__(self, folder: Path, max_size: int = 64 * 2**30, recorder: Recorder = RECORDER) -> None:
        self._copies = FolderCache(folder, _is_whole)
        self._recorder = recorder
        self._max_size = max_size  # bytes, of all copies together
        self._pins: dict[str, int] = {}  # generation -> descriptor that holds `<generation>.use`
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._copies.folder.mkdir(parents=True, exist_ok=True)

    @property
    def pinned(self) -> frozenset[str]:
        """The generations this process uses."""
        return frozenset(self._pins)

    async def ensure(self, entry: Entry, fetch: Fetch) -> Path:
        """The folder of an entry's prepared files, fetched if this node lacks them; in use until `release`.

        Raises `XloomError`: what `fetch` raises, transfer_corrupt (what came is not what was asked for, twice),
        cache_unwritable.
        """
        generation = entry.generation
        if not _GENERATION.match(generation):
            raise XloomError("invalid_generation", f"{generation!r} is not a generation.", status=500)
        async with self._busy[generation]:
            if generation in self._pins:
                self._recorder.inc(CACHE_READS, outcome="hit")
                return self._copies.path(generation)
            try:
                return await self._ensure(generation, fetch)
            except OSError as error:
                raise XloomError(
                    "cache_unwritable",
                    f"The node cache {self._copies.folder} failed: {error}.",
                    "Free disk space there, or set store.cache to another folder.",
                    500,
                ) from None

    def release(self, generation: str) -> None:
        """This process no longer uses the copy; it stays on disk until the space is needed."""
        descriptor = self._pins.pop(generation, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Release everything."""
        for generation in list(self._pins):
            self.release(generation)

    async def _ensure(self, generation: str, fetch: Fetch) -> Path:
        use = await self._lock(generation, _USE, shared=True)
        try:
            write = await self._lock(generation, _WRITE)
            try:
                target = await asyncio.to_thread(self._copies.find, generation)
                self._recorder.inc(CACHE_READS, outcome="hit" if target else "miss")
                if target is None:
                    await self._fill(generation, fetch)
            finally:
                os.close(write)
            os.utime(self._copies.lock_path(generation, _USE))  # the time of last use
        except BaseException:
            os.close(use)
            raise
        self._pins[generation] = use
        await asyncio.to_thread(self._trim)
        return self._copies.path(generation)

    async def _fill(self, generation: str, fetch: Fetch) -> None:
        for _attempt in range(2):
            files = await fetch(generation)
            plain = all(Path(name).name == name for name in files)
            if plain and await asyncio.to_thread(generation_of, files) == generation:
                await asyncio.to_thread(self._write, generation, files)
                return
            logger.warning("what came for generation %s has another content", generation)
        raise XloomError(
            "transfer_corrupt",
            f"Generation {generation} came damaged from the adapter store, twice.",
            "Remove the adapter and add it again.",
            502,
        )

    def _write(self, generation: str, files: Mapping[str, bytes]) -> None:
        with self._copies.make(generation) as folder:
            for name, data in files.items():
                (folder / name).write_bytes(data)

    def _trim(self) -> None:
        """Evict the copies used longest ago that no process uses, down to the size limit."""
        copies = [folder for folder in self._copies.folder.iterdir() if _GENERATION.match(folder.name)]
        sizes = {folder.name: _size(folder) for folder in copies}
        excess = sum(sizes.values()) - self._max_size
        for generation in sorted(sizes, key=self._last_use):
            if excess <= 0:
                return
            if generation not in self._pins and self._evict(generation):
                excess -= sizes[generation]

    def _evict(self, generation: str) -> bool:
        descriptor = self._copies.try_lock(generation, _USE)
        if descriptor is None:
            return False
        try:
            self._copies.remove(generation, (_WRITE, _USE))
        finally:
            os.close(descriptor)
        return True

    def _last_use(self, generation: str) -> float:
        try:
            return self._copies.lock_path(generation, _USE).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    async def _lock(self, generation: str, purpose: str, *, shared: bool = False) -> int:
        """A descriptor that holds a lock of the generation. Polls, so that no thread is kept waiting."""
        # Other processes hold these locks: there is no event of ours to wait for.
        while (descriptor := self._copies.try_lock(generation, purpose, shared=shared)) is None:
            await asyncio.sleep(_LOCK_POLL_S)
        return descriptor


def _is_whole(folder: Path) -> bool:
    whole = generation_of(read_files(folder)) == folder.name
    if not whole:
        logger.warning("the copy %s is damaged: it is fetched anew", folder)
    return whole


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return 0
