from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from xloom.adapters.adapter_cache import AdapterCache
from xloom.adapters.manifest import Entry, generation_of
from xloom.protocol import XloomError


class Store:
    """Generations by their content, and how often each was asked for."""

    def __init__(self, delay_s: float = 0) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.delay_s = delay_s

    def entry(self, content: bytes) -> Entry:
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": content}
        generation = generation_of(files)
        self.files[generation] = files
        return Entry("name", "lora", generation, 4, ("q_proj",), len(content), "source")

    async def fetch(self, generation: str) -> Mapping[str, bytes]:
        self.asked.append(generation)
        await asyncio.sleep(self.delay_s)
        return self.files[generation]


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


async def test_a_generation_is_fetched_once_and_then_found(tmp_path: Path) -> None:
    store = Store()
    entry = store.entry(b"weights")
    cache = AdapterCache(tmp_path)
    path = await cache.ensure(entry, store.fetch)
    assert path == tmp_path / entry.generation
    assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    await cache.ensure(entry, store.fetch)
    cache.close()
    await AdapterCache(tmp_path).ensure(entry, store.fetch)
    assert len(store.asked) == 1


async def test_many_at_once_fetch_once(tmp_path: Path) -> None:
    store = Store(delay_s=0.05)
    entry = store.entry(b"weights")
    caches = [AdapterCache(tmp_path) for _ in range(3)]
    paths = await asyncio.gather(*(cache.ensure(entry, store.fetch) for cache in caches for _ in range(4)))
    assert len(set(paths)) == 1
    assert len(store.asked) == 1


@pytest.mark.parametrize("damage", ["flipped", "missing file", "extra file"])
async def test_a_damaged_copy_is_fetched_anew(tmp_path: Path, damage: str) -> None:
    store = Store()
    entry = store.entry(b"weights")
    cache = AdapterCache(tmp_path)
    path = await cache.ensure(entry, store.fetch)
    cache.release(entry.generation)
    match damage:
        case "flipped":
            (path / "adapter_model.safetensors").write_bytes(b"wEights")
        case "missing file":
            (path / "adapter_config.json").unlink()
        case "extra file":
            (path / "extra.json").write_text("{}")
    await cache.ensure(entry, store.fetch)
    assert len(store.asked) == 2
    assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert copies(tmp_path) == {entry.generation}


async def test_a_damaged_transfer_is_asked_for_again_and_never_kept(tmp_path: Path) -> None:
    store = Store()
    entry = store.entry(b"weights")
    good = store.files[entry.generation]
    store.files[entry.generation] = good | {"adapter_model.safetensors": b"other"}
    with pytest.raises(XloomError) as caught:
        await AdapterCache(tmp_path).ensure(entry, store.fetch)
    assert caught.value.code == "transfer_corrupt"
    assert len(store.asked) == 2
    assert copies(tmp_path) == set()
    store.files[entry.generation] = good
    assert (await AdapterCache(tmp_path).ensure(entry, store.fetch)).is_dir()


async def test_a_failed_fetch_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    store = Store()
    entry = store.entry(b"weights")

    async def fail(generation: str) -> Mapping[str, bytes]:
        raise XloomError("store_unavailable", "gone", status=503)

    cache = AdapterCache(tmp_path)
    with pytest.raises(XloomError) as caught:
        await cache.ensure(entry, fail)
    assert caught.value.code == "store_unavailable"
    assert cache.pinned == frozenset()
    assert (await cache.ensure(entry, store.fetch)).is_dir()


async def test_a_generation_that_is_a_path_is_refused(tmp_path: Path) -> None:
    entry = Entry("name", "lora", "../../etc", 4, (), 1, "source")
    with pytest.raises(XloomError) as caught:
        await AdapterCache(tmp_path / "cache").ensure(entry, Store().fetch)
    assert caught.value.code == "invalid_generation"


async def test_the_copy_used_longest_ago_goes_first_and_none_in_use(tmp_path: Path) -> None:
    store = Store()
    entries = [store.entry(bytes([number]) * 1000) for number in range(4)]
    cache = AdapterCache(tmp_path, max_size=3100)  # three copies
    other = AdapterCache(tmp_path, max_size=3100)
    for second, entry in enumerate(entries[:3]):
        await cache.ensure(entry, store.fetch)
        os.utime(tmp_path / f"{entry.generation}.use", (second, second))
    await other.ensure(entries[0], store.fetch)  # in use by another holder, though the oldest
    os.utime(tmp_path / f"{entries[0].generation}.use", (0, 0))
    cache.release(entries[0].generation)
    cache.release(entries[1].generation)
    await cache.ensure(entries[3], store.fetch)
    assert copies(tmp_path) == {entries[index].generation for index in (0, 2, 3)}
    assert not (tmp_path / f"{entries[1].generation}.use").exists()
    await cache.ensure(entries[1], store.fetch)  # everything else is in use: over the limit, nothing is evicted
    assert copies(tmp_path) == {entry.generation for entry in entries}


def _hammer(folder: str, contents: list[bytes], rounds: int) -> None:
    async def run() -> None:
        store = Store(delay_s=0.001)
        entries = [store.entry(content) for content in contents]
        for number in range(rounds):
            cache = AdapterCache(Path(folder), max_size=2100)  # two copies of three: someone always evicts
            entry = entries[(number + os.getpid()) % len(entries)]
            path = await cache.ensure(entry, store.fetch)
            await asyncio.sleep(0.002)
            assert (path / "adapter_model.safetensors").read_bytes() in contents
            cache.close()

    asyncio.run(run())


def test_processes_that_fetch_and_evict_at_once_always_find_what_they_hold(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    contents = [bytes([number]) * 1000 for number in range(3)]
    workers = [context.Process(target=_hammer, args=(str(tmp_path), contents, 40)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
