"""What a replica counts: its engine's figures, adapters coming and going, the node's cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes import FakeBackend
from xloom.adapters.cache import NodeCache
from xloom.adapters.manifest import Entry, Manifest, generation_of
from xloom.observability import table
from xloom.observability.recorder import Recorder
from xloom.protocol import EngineStats, XloomError
from xloom.replica.figures import EngineFigures
from xloom.replica.reconcile import Reconciler
from xloom.replica.server import ReplicaServer


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


def test_each_report_is_shown_and_preemptions_are_counted_once() -> None:
    recorder = Recorder()
    figures = EngineFigures(recorder, "r1")
    figures.take(EngineStats(3, 2, 7, 64, preemptions=4, adapters=["code@1", "blend@2"]))
    figures.take(EngineStats(1, 0, 5, 64, preemptions=5, adapters=["code@1"]))
    assert recorder.value(table.REPLICA_RUNNING, replica="r1") == 1
    assert recorder.value(table.REPLICA_WAITING, replica="r1") == 0
    assert recorder.value(table.KV_PAGES_USED, replica="r1") == 5
    assert recorder.value(table.KV_PAGES_TOTAL, replica="r1") == 64
    assert recorder.value(table.ADAPTERS_RESIDENT, replica="r1") == 1
    assert recorder.value(table.PREEMPTIONS, replica="r1") == 5


async def test_a_server_shows_its_engine_without_any_router() -> None:
    recorder = Recorder()
    server = ReplicaServer(FakeBackend(pages=48), "r1", "secret")
    server.on_report = EngineFigures(recorder, "r1").take
    await server.start("127.0.0.1")
    await until(lambda: recorder.value(table.KV_PAGES_TOTAL, replica="r1") == 48)
    await server.close()


class Store:
    """A store's desired state, set by the test."""

    def __init__(self) -> None:
        self.manifest = Manifest(0)
        self.files: dict[str, dict[str, bytes]] = {}
        self.changed = asyncio.Event()

    def put(self, name: str, content: bytes) -> Entry:
        files = {"adapter_model.safetensors": content}
        entry = Entry(name, "lora", generation_of(files), 8, (), len(content), "test")
        self.files[entry.generation] = files
        self.set(self.manifest.with_entry(entry))
        return entry

    def set(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.changed.set()

    async def desired(self, known_version: int, timeout_s: float) -> Manifest:
        while self.manifest.version == known_version:
            self.changed.clear()
            await self.changed.wait()
        return self.manifest

    async def fetch(self, generation: str) -> dict[str, bytes]:
        return self.files[generation]

    async def report(self, *about: Any) -> None: ...

    async def forget(self, replica_id: str) -> None: ...


async def test_adapters_that_come_go_and_are_refused_are_counted(tmp_path: Path) -> None:
    recorder, store, backend = Recorder(), Store(), FakeBackend()
    backend.refused["bad"] = XloomError("adapter_load_failed", "wrong shape", status=400)
    reconciler = Reconciler(backend, store, NodeCache(tmp_path, recorder=recorder), "r1", "n1", recorder)
    store.put("code", b"1")
    store.put("bad", b"2")
    await reconciler.start(10)
    assert recorder.value(table.ADAPTER_SWAPS, model="code", action="load") == 1
    assert recorder.value(table.ADAPTER_LOAD, model="code") == 1
    assert recorder.value(table.ADAPTER_SWAPS, model="bad", action="refused") == 1
    assert recorder.value(table.ADAPTER_LOAD, model="bad") == 0
    store.set(store.manifest.without("code"))
    await until(lambda: recorder.value(table.ADAPTER_SWAPS, model="code", action="remove") == 1)
    assert recorder.value(table.ADAPTER_SWAPS) == 3
    await reconciler.close()


async def test_reads_of_the_nodes_cache_are_hits_or_misses(tmp_path: Path) -> None:
    recorder, store = Recorder(), Store()
    entry = store.put("code", b"1")
    first, second = (NodeCache(tmp_path, recorder=recorder) for _ in range(2))
    await first.ensure(entry, store.fetch)
    assert recorder.value(table.CACHE_READS, outcome="miss") == recorder.value(table.CACHE_READS) == 1
    await first.ensure(entry, store.fetch)
    await second.ensure(entry, store.fetch)
    assert recorder.value(table.CACHE_READS, outcome="hit") == 2
    first.close()
    second.close()
