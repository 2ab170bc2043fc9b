"""A replica's adapters follow the store's desired state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.fakes import FakeBackend, FakeStore, until
from xloom.adapters.adapter_cache import AdapterCache
from xloom.adapters.manifest import Entry, Manifest
from xloom.protocol import AdapterRef, XloomError
from xloom.replica.reconcile import Reconciler


class Scene:
    def __init__(self, folder: Path) -> None:
        self.store, self.backend = FakeStore(), FakeBackend()
        self.reconciler = Reconciler(self.backend, self.store, AdapterCache(folder), "r1", "n1")


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    made = Scene(tmp_path)
    yield made
    await made.reconciler.close()


async def test_a_start_brings_what_is_wanted(scene: Scene) -> None:
    entries = [scene.store.put("code", b"1"), scene.store.put("prose", b"2")]
    await scene.reconciler.start(10)
    assert set(scene.backend.adapters) == {entry.key for entry in entries}


async def test_later_adapters_are_brought_and_reported(scene: Scene) -> None:
    await scene.reconciler.start(10)
    entry = scene.store.put("code", b"1")
    assert await asyncio.wait_for(scene.reconciler.arrival(entry.ref), 10)
    await until(lambda: scene.store.reports[-1][0] == [entry.key])


async def test_one_bad_adapter_does_not_block_others(scene: Scene) -> None:
    scene.backend.refused["bad"] = XloomError("adapter_load_failed", "wrong shape", status=400)
    bad, good = scene.store.put("bad", b"1"), scene.store.put("good", b"2")
    await scene.reconciler.start(10)
    assert set(scene.backend.adapters) == {good.key}
    assert not await scene.reconciler.arrival(bad.ref)
    await until(lambda: bool(scene.store.reports) and bad.key in scene.store.reports[-1][1])


async def test_a_mended_adapter_is_tried_again_under_its_new_generation(scene: Scene) -> None:
    scene.backend.refused["code"] = XloomError("adapter_load_failed", "wrong shape", status=400)
    scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    scene.backend.refused.clear()
    mended = scene.store.put("code", b"2")
    assert await asyncio.wait_for(scene.reconciler.arrival(mended.ref), 10)


def verified(scene: Scene, name: str) -> Entry:
    """An entry of the store's that a replica has to prove."""
    entry = msgspec.structs.replace(scene.store.put(name, name.encode()), verify=True)
    scene.store.set(scene.store.manifest.with_entry(entry))
    return entry


async def test_what_is_to_be_verified_is_resident_once_it_has_passed(scene: Scene) -> None:
    passed = asyncio.Event()

    async def admit(ref: AdapterRef, path: Path) -> None:
        await passed.wait()
        await scene.backend.add_adapter(ref, path)

    scene.reconciler.admit = admit
    plain, entry = scene.store.put("plain", b"1"), verified(scene, "code")
    await scene.reconciler.start(0.1)
    assert await asyncio.wait_for(scene.reconciler.arrival(plain.ref), 10)
    assert entry.ref not in scene.reconciler.resident
    passed.set()
    assert await asyncio.wait_for(scene.reconciler.arrival(entry.ref), 10)


async def test_what_does_not_pass_is_refused_with_its_code(scene: Scene) -> None:
    async def admit(ref: AdapterRef, path: Path) -> None:
        raise XloomError("adapter_not_verified", "It answers as the base model does.")

    scene.reconciler.admit = admit
    entry = verified(scene, "code")
    await scene.reconciler.start(10)
    assert not await scene.reconciler.arrival(entry.ref)
    await until(lambda: bool(scene.store.reports) and entry.key in scene.store.reports[-1][1])
    assert scene.store.reports[-1][1][entry.key].code == "adapter_not_verified"


async def test_a_replica_that_can_not_verify_does_not_serve_what_it_should(scene: Scene) -> None:
    entry = verified(scene, "code")
    await scene.reconciler.start(10)
    assert not await scene.reconciler.arrival(entry.ref)
    assert scene.backend.adapters == {}


async def test_an_adapter_in_use_is_removed_after_its_last_request(scene: Scene) -> None:
    entry = scene.store.put("code", b"1")
    users = 1
    scene.reconciler.users = lambda ref: users
    await scene.reconciler.start(10)
    other = scene.store.put("other", b"2")
    scene.store.set(scene.store.manifest.without("code"))
    await scene.reconciler.arrival(other.ref)
    assert entry.key in scene.backend.adapters
    users = 0
    await until(lambda: set(scene.backend.adapters) == {other.key})


async def test_an_adapter_wanted_again_while_in_use_stays(scene: Scene) -> None:
    entry = scene.store.put("code", b"1")
    users = 1
    scene.reconciler.users = lambda ref: users
    await scene.reconciler.start(10)
    scene.store.set(scene.store.manifest.without("code"))
    await until(lambda: bool(scene.reconciler._work))
    scene.store.put("code", b"1")
    await until(lambda: not scene.reconciler._work)
    users = 0
    other = scene.store.put("other", b"2")
    await scene.reconciler.arrival(other.ref)
    assert entry.key in scene.backend.adapters


async def test_an_adapter_added_again_while_its_removal_is_under_way_is_loaded(scene: Scene) -> None:
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    scene.backend.removing = asyncio.Event()
    scene.store.set(scene.store.manifest.without("code"))
    await until(lambda: entry.ref not in scene.reconciler.resident)
    scene.store.put("code", b"1")
    other = scene.store.put("other", b"2")
    await scene.reconciler.arrival(other.ref)  # the change is known
    scene.backend.removing.set()
    assert await asyncio.wait_for(scene.reconciler.arrival(entry.ref), 10)
    assert set(scene.backend.adapters) == {entry.key, other.key}


async def test_a_replacement_and_its_way_back_at_once_are_served(scene: Scene) -> None:
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    for content in (b"2", b"1", b"2", b"1"):
        entry = scene.store.put("code", content)
        await asyncio.sleep(0)
    assert await asyncio.wait_for(scene.reconciler.arrival(entry.ref), 10)
    await until(lambda: set(scene.backend.adapters) == {entry.key})
    assert scene.reconciler.resident == {entry.ref}


async def test_what_the_store_wants_no_more_is_not_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xloom.replica.reconcile.UNWANTED_S", 0.05)
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    scene.store.set(scene.store.manifest.without("code"))
    await until(lambda: not scene.reconciler.resident)
    assert not await asyncio.wait_for(scene.reconciler.arrival(entry.ref), 5)


@pytest.mark.parametrize("error", [OSError("no memory"), XloomError("cache_unwritable", "disk full", status=500)])
async def test_a_failure_that_may_pass_is_told_and_tried_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("xloom.replica.reconcile.RETRY_S", 0.001)
    scene.backend.refused["code"] = error
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    await until(lambda: entry.key in scene.store.reports[-1][1])
    assert scene.backend.tries.count("code") >= 3
    assert (
        str(error.args[-1] if isinstance(error, OSError) else "disk full")
        in scene.store.reports[-1][1][entry.key].reason
    )
    scene.backend.refused.clear()
    await until(lambda: scene.store.reports[-1] == ([entry.key], {}))


async def test_a_verdict_on_the_files_is_not_tried_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xloom.replica.reconcile.RETRY_S", 0.001)
    scene.backend.refused["code"] = XloomError("wrong_shape", "wrong shape", status=400)
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    await scene.reconciler.arrival(scene.store.put("other", b"2").ref)
    assert scene.backend.tries == ["code", "other"]
    assert not await scene.reconciler.arrival(entry.ref)


async def test_an_engine_that_does_not_answer_is_named_and_asked_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xloom.replica.reconcile.LOAD_S", 0.01)
    monkeypatch.setattr("xloom.replica.reconcile.RETRY_S", 0.001)
    silent, load = True, scene.backend.add_adapter

    async def add_adapter(ref: AdapterRef, path: Path) -> None:
        if silent:
            await asyncio.Event().wait()
        await load(ref, path)

    monkeypatch.setattr(scene.backend, "add_adapter", add_adapter)
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    await until(lambda: entry.key in scene.store.reports[-1][1])
    told = scene.store.reports[-1][1][entry.key]
    assert told.code == "no_answer"
    assert told.reason.startswith("The engine did not answer within")
    silent = False
    await until(lambda: scene.reconciler.resident == {entry.ref})


async def test_a_store_that_is_away_leaves_the_adapters(scene: Scene) -> None:
    entry = scene.store.put("code", b"1")
    await scene.reconciler.start(10)
    scene.store.away = True
    scene.store.set(Manifest(scene.store.manifest.version + 1, scene.store.manifest.entries))
    await asyncio.sleep(0.05)
    assert entry.ref in scene.reconciler.resident
    scene.store.away = False
    other = scene.store.put("other", b"2")
    assert await asyncio.wait_for(scene.reconciler.arrival(other.ref), 10)
