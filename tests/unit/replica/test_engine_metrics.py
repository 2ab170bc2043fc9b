"""What a replica counts: its engine's figures, adapters coming and going, the node's cache."""

from __future__ import annotations

from pathlib import Path

from tests.fakes import FakeBackend, FakeStore, until
from xloom.adapters.adapter_cache import AdapterCache
from xloom.observability import table
from xloom.observability.recorder import Recorder
from xloom.protocol import EngineStats, XloomError
from xloom.replica.engine_metrics import EngineMetrics
from xloom.replica.reconcile import Reconciler
from xloom.replica.server import ReplicaServer


def test_each_report_is_shown_and_preemptions_are_counted_once() -> None:
    recorder = Recorder()
    figures = EngineMetrics(recorder, "r1")
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
    server.on_report = EngineMetrics(recorder, "r1").take
    await server.start("127.0.0.1")
    await until(lambda: recorder.value(table.KV_PAGES_TOTAL, replica="r1") == 48)
    await server.close()


async def test_adapters_that_come_go_and_are_refused_are_counted(tmp_path: Path) -> None:
    recorder, store, backend = Recorder(), FakeStore(), FakeBackend()
    backend.refused["bad"] = XloomError("adapter_load_failed", "wrong shape", status=400)
    reconciler = Reconciler(backend, store, AdapterCache(tmp_path, recorder=recorder), "r1", "n1", recorder)
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
    recorder, store = Recorder(), FakeStore()
    entry = store.put("code", b"1")
    first, second = (AdapterCache(tmp_path, recorder=recorder) for _ in range(2))
    await first.ensure(entry, store.fetch)
    assert recorder.value(table.CACHE_READS, outcome="miss") == recorder.value(table.CACHE_READS) == 1
    await first.ensure(entry, store.fetch)
    await second.ensure(entry, store.fetch)
    assert recorder.value(table.CACHE_READS, outcome="hit") == 2
    first.close()
    second.close()
