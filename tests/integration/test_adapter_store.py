"""The adapter store as an actor of a real Ray: object store, long poll, crashes, errors."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.models import ATTENTION, tiny_adapter, tiny_bundle, tiny_model
from xloom.adapters.adapter_cache import AdapterCache
from xloom.adapters.client import StoreClient, open_store
from xloom.adapters.manifest import generation_of
from xloom.adapters.residency import Refusal
from xloom.protocol import Overrides, XloomError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="xr", dir="/tmp")  # short: Ray keeps sockets in it
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    base = tiny_model(folder / "base", "llama")
    return {
        "base": base,
        "code": tiny_adapter(folder / "code", base, rank=4, targets=ATTENTION),
        "docs": tiny_adapter(folder / "docs", base, rank=4, targets=ATTENTION, seed=3),
        "blend": tiny_bundle(folder / "blend", base),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
async def store(cluster: None, sources: dict[str, Path], folder: Path) -> StoreClient:
    """One actor for all tests, empty at each one's start."""
    client = await open_store(str(folder), str(sources["base"]), reserved_names=["base"])
    for entry in await client.entries():
        await client.remove(entry.name)
    for replica in await client.residency():
        await client.forget(replica)
    return client


async def process_id(store: StoreClient) -> int:
    pid: int = await store._actor.__ray_call__.remote(lambda _: os.getpid())
    return pid


async def kill(store: StoreClient) -> int:
    """SIGKILL the actor's process, as the kernel's memory killer would; returns its process id."""
    pid = await process_id(store)
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_what_is_added_is_listed_and_comes_through_the_object_store(
    store: StoreClient, sources: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    code = await store.add("code", str(sources["code"]))
    blend = await store.add("blend", str(sources["blend"]), overrides=Overrides(top_k=2))
    assert [(entry.name, entry.kind) for entry in await store.entries()] == [("code", "lora"), ("blend", "xlora")]
    files = await store.fetch(blend.generation)
    assert generation_of(files) == blend.generation
    path = await AdapterCache(tmp_path / "node").ensure(code, store.fetch)
    assert (path / "adapter_model.safetensors").is_file()
    again = await open_store(str(folder), str(sources["base"]), reserved_names=["base"])
    assert await process_id(again) == await process_id(store)
    assert await again.entries() == await store.entries()
    assert (await again.remove("code")) == code
    assert [entry.name for entry in await store.entries()] == ["blend"]


async def test_a_change_wakes_those_who_wait_within_a_second(store: StoreClient, sources: dict[str, Path]) -> None:
    await store.add("code", str(sources["code"]))
    version = (await store.desired(-1, 60)).version
    waiters = [asyncio.ensure_future(store.desired(version, 60)) for _ in range(3)]
    _, pending = await asyncio.wait(waiters, timeout=0.5)
    assert len(pending) == 3
    await store.remove("code")
    removed = time.monotonic()
    manifests = await asyncio.gather(*waiters)
    assert time.monotonic() - removed < 1
    assert {(manifest.version, manifest.entries) for manifest in manifests} == {(version + 1, ())}


async def test_a_poll_without_a_change_ends_with_its_time(store: StoreClient) -> None:
    manifest = await store.desired((await store.desired(-1, 60)).version, 0.2)
    assert manifest.entries == ()


async def test_a_killed_store_comes_back_with_nothing_lost(store: StoreClient, sources: dict[str, Path]) -> None:
    code = await store.add("code", str(sources["code"]))
    blend = await store.add("blend", str(sources["blend"]))
    before = await store.desired(-1, 60)
    files = await store.fetch(blend.generation)
    [lost] = await store._call("fetch", code.generation, False)
    waiting = asyncio.ensure_future(store.desired(before.version, 60))  # in flight as the actor dies
    killed = await kill(store)
    assert await store.entries() == before.entries
    assert await process_id(store) != killed
    assert await store.fetch(blend.generation) == files
    with pytest.raises(ray.exceptions.ObjectLostError):
        await lost
    assert generation_of(await store.fetch(code.generation)) == code.generation
    await store.remove("code")
    assert (await asyncio.wait_for(waiting, 10)).entries == (blend,)


async def test_calls_cut_short_by_a_kill_are_made_again(store: StoreClient, sources: dict[str, Path]) -> None:
    await store.add("code", str(sources["code"]))
    calls = [
        asyncio.ensure_future(store.remove("code")),
        asyncio.ensure_future(store.add("docs", str(sources["docs"]))),
        asyncio.ensure_future(store.add("blend", str(sources["blend"]))),
    ]
    await kill(store)
    await asyncio.gather(*calls)
    assert {entry.name for entry in await store.entries()} == {"docs", "blend"}
    assert [generation_of(await store.fetch(entry.generation)) for entry in await store.entries()] == [
        entry.generation for entry in await store.entries()
    ]


async def test_a_stopped_store_is_started_anew_and_what_was_asked_is_done(
    cluster: None, sources: dict[str, Path], tmp_path: Path
) -> None:
    store = await open_store(str(tmp_path), str(sources["base"]), stuck_timeout_s=1.0)
    await store.add("code", str(sources["code"]))
    stopped = await process_id(store)
    os.kill(stopped, signal.SIGSTOP)
    await asyncio.wait_for(asyncio.gather(store.remove("code"), store.add("docs", str(sources["docs"]))), 60)
    assert [entry.name for entry in await store.entries()] == ["docs"]
    assert await process_id(store) != stopped
    store.stop()


async def test_a_store_that_does_not_answer_is_named_and_a_change_given_up_is_not_made_later(
    cluster: None, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xloom.adapters.client._GRACE_S", 0.5)
    store = await open_store(str(tmp_path), str(sources["base"]), stuck_timeout_s=3600.0)
    await store.add("code", str(sources["code"]))
    store._patience_s = 0.5
    stopped = await process_id(store)
    os.kill(stopped, signal.SIGSTOP)
    try:
        for call in (store.remove("code"), store.entries(), store.desired(0, 0.1)):
            with pytest.raises(XloomError) as caught:
                await call
            assert (caught.value.code, caught.value.status) == ("store_unavailable", 503)
            assert "The adapter store" in caught.value.message
    finally:
        os.kill(stopped, signal.SIGCONT)
    store._patience_s = 30.0
    assert [entry.name for entry in await store.entries()] == ["code"]
    assert await process_id(store) == stopped
    store.stop()


async def test_a_damaged_generation_is_fetched_from_its_source_again(
    store: StoreClient, sources: dict[str, Path], folder: Path
) -> None:
    entry = await store.add("code", str(sources["code"]))
    [file] = folder.glob(f"*/prepared/{entry.generation}/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:64])
    fetched = await asyncio.gather(store.fetch(entry.generation), store.fetch(entry.generation))
    assert [generation_of(files) for files in fetched] == [entry.generation] * 2
    assert await store.entries() == (entry,)


async def test_an_absence_is_not_waited_for_once_it_is_wanted_again(
    store: StoreClient, sources: dict[str, Path]
) -> None:
    entry = await store.add("code", str(sources["code"]))
    await store.report("one", "node", [entry.key])
    await store.remove("code")
    leaving = asyncio.ensure_future(store.await_absent("code", entry.generation, 30))
    await store.add("code", str(sources["code"]))
    await asyncio.wait_for(leaving, 5)


@pytest.mark.parametrize(
    ("name", "source", "code", "status"),
    [
        ("../evil", "code", "invalid_adapter_name", 400),
        ("base", "code", "name_reserved", 409),
        ("new", "/nowhere/at/all", "source_not_found", 404),
        ("new", "base", "broken_adapter", 400),
        ("taken", "docs", "adapter_exists", 409),
    ],
)
async def test_errors_arrive_as_they_were_raised(
    store: StoreClient, sources: dict[str, Path], name: str, source: str, code: str, status: int
) -> None:
    await store.add("taken", str(sources["code"]))
    with pytest.raises(XloomError) as caught:
        await store.add(name, str(sources.get(source, source)))
    assert type(caught.value) is XloomError
    assert (caught.value.code, caught.value.status) == (code, status)
    assert caught.value.cure
    assert [entry.name for entry in await store.entries()] == ["taken"]


async def test_another_base_model_has_a_store_of_its_own(
    store: StoreClient, sources: dict[str, Path], folder: Path
) -> None:
    await store.add("code", str(sources["code"]))
    other = await open_store(str(folder), "another/base")
    assert await process_id(other) != await process_id(store)
    assert await other.entries() == ()
    other.stop()
    assert [entry.name for entry in await store.entries()] == ["code"]


async def test_a_store_of_other_settings_is_replaced_and_found_by_those_who_held_it(
    store: StoreClient, sources: dict[str, Path], folder: Path
) -> None:
    await store.add("code", str(sources["code"]))
    before = await process_id(store)
    same = await open_store(str(folder), str(sources["base"]), reserved_names=["base"])
    assert await process_id(same) == before
    narrow = await open_store(str(folder), str(sources["base"]), reserved_names=["base"], max_rank=2)
    assert await process_id(narrow) != before
    assert [entry.name for entry in await store.entries()] == ["code"]  # through a client of the one that is gone
    with pytest.raises(XloomError, match="limit is 2"):
        await store.add("docs", str(sources["docs"]))


async def test_a_store_that_is_not_there_is_store_unavailable(
    cluster: None, sources: dict[str, Path], tmp_path: Path
) -> None:
    client = await open_store(str(tmp_path), str(sources["base"]))
    client._patience_s = 0.5
    client.stop()
    with pytest.raises(XloomError) as caught:
        await client.entries()
    assert (caught.value.code, caught.value.status) == ("store_unavailable", 503)


async def test_residency_is_waited_for(store: StoreClient, sources: dict[str, Path]) -> None:
    entry = await store.add("code", str(sources["code"]))
    await store.report("one", "node", [entry.key])
    await store.report("two", "node", [])
    waiting = asyncio.ensure_future(store.await_resident("code", entry.generation, 30))
    _, pending = await asyncio.wait([waiting], timeout=0.3)
    assert pending
    with pytest.raises(XloomError) as caught:
        await store.await_resident("code", entry.generation, 0.1)
    assert caught.value.code == "adapter_not_resident"
    assert "two" in caught.value.message
    await store.report("two", "node", [entry.key])
    assert await waiting == ["one", "two"]
    assert set(await store.residency()) == {"one", "two"}

    await store.remove("code")
    leaving = asyncio.ensure_future(store.await_absent("code", entry.generation, 30))
    await store.report("one", "node", [])
    await store.forget("two")
    await leaving
    with pytest.raises(XloomError) as caught:
        await store.await_resident("code", entry.generation, 5)
    assert caught.value.code == "adapter_superseded"


@pytest.mark.parametrize(
    ("code", "told"),
    [("wrong_shape", "adapter_load_failed"), ("adapter_not_verified", "adapter_not_verified")],
)
async def test_an_engine_that_refuses_an_adapter_ends_the_wait(
    store: StoreClient, sources: dict[str, Path], code: str, told: str
) -> None:
    entry = await store.add("code", str(sources["code"]))
    await store.report("one", "node", [])  # there, and without it
    waiting = asyncio.ensure_future(store.await_resident("code", entry.generation, 30))
    await store.report("one", "node", [], {entry.key: Refusal(code, "out of memory")})
    with pytest.raises(XloomError) as caught:
        await waiting
    assert caught.value.code == told
    assert "out of memory" in caught.value.message


async def test_what_requests_mix_is_made_once_and_gives_way_when_it_is_idle(
    store: StoreClient, sources: dict[str, Path]
) -> None:
    entries = {name: await store.add(name, str(sources[name])) for name in ("code", "docs")}
    parts = {name: entry.generation for name, entry in entries.items()}
    both, again = await asyncio.gather(*(store.gather(each, 64, 1) for each in (parts, dict(reversed(parts.items())))))
    assert both == again
    assert (both.adapters, both.rank) == (("code", "docs"), 8)
    assert generation_of(await store.fetch(both.generation)) == both.generation
    assert await store.entries() == tuple(entries.values())

    with pytest.raises(XloomError) as busy:  # in use just now, and one is the most
        await store.gather({"code": parts["code"]}, 64, 1)
    assert busy.value.code == "mixtures_busy"
    await store.keep([], 600)
    assert both.name in (await store.desired(-1, 0)).of_requests
    await store.keep([], -1)
    assert not (await store.desired(-1, 0)).of_requests
    with pytest.raises(XloomError) as wide:
        await store.gather(parts, 4, 1)
    assert wide.value.code == "rank_too_large"


async def test_one_replica_that_holds_what_a_request_mixes_is_enough(
    store: StoreClient, sources: dict[str, Path]
) -> None:
    entry = await store.add("code", str(sources["code"]))
    mixed = await store.gather({"code": entry.generation}, 64, 4)
    await store.report("a", "node", [])
    await store.report("b", "node", [])
    waiting = asyncio.ensure_future(store.await_held(mixed.name, mixed.generation, 30))
    await store.report("a", "node", [mixed.key])
    await waiting
    await store.report("a", "node", [], {mixed.key: Refusal("adapter_load_failed", "no room")})
    with pytest.raises(XloomError, match="could not load code: no room"):
        await store.await_held(mixed.name, mixed.generation, 30)
    await store.report("a", "node", [])
    with pytest.raises(XloomError) as late:
        await store.await_held(mixed.name, mixed.generation, 0.1)
    assert late.value.code == "adapter_not_resident"
    await store.remove("code")
    with pytest.raises(XloomError) as gone:
        await store.await_held(mixed.name, mixed.generation, 30)
    assert gone.value.code == "adapter_superseded"
