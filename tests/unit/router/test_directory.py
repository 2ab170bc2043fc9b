"""The connections of a router: strangers, peers that stop, and those of another version."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import expected_tokens, until
from tests.fleet import Fleet, request
from xloom.replica import connections
from xloom.router import directory
from xloom.wire import greeting, silence


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet()
    made.dispatcher.start()
    yield made
    await made.close()


@pytest.fixture
async def hurried(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """A fleet whose seconds are fiftieths."""
    for module in (silence, directory, connections):
        monkeypatch.setattr(module, "TICK_S", 0.02)
    monkeypatch.setattr(connections, "PING_S", 0.02)
    monkeypatch.setattr("xloom.replica.server.REPORT_PERIOD_S", 0.01)
    made = Fleet(silent_after_s=0.2)
    made.dispatcher.start()
    yield made
    await made.close()


async def test_strangers_are_few_and_may_send_little(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold connections open and announce frames of 64 MiB; routers come in all the same."""
    monkeypatch.setattr(connections, "MAX_STRANGERS", 8)
    await fleet.add("a")
    info = fleet.infos["a"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strangers = [await asyncio.open_connection(info.host, info.port) for _ in range(20)]
    for _, writer in strangers[:10]:
        writer.write((64 << 20).to_bytes(4, "big") + bytes(1 << 20))
    kept = fleet.servers["a"]._connections._strangers
    await until(lambda: len(kept) <= 8)
    fleet.dispatcher.submit(request())
    await until(lambda: "r" in fleet.finished)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 60 * 1024  # KiB
    for reader, writer in strangers[:10]:  # turned away, not waited for
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.transport.abort()
    for _, writer in strangers[10:]:
        writer.transport.abort()


async def test_a_stranger_that_says_nothing_is_let_go(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "GREETING_TIMEOUT_S", 0.05)
    await fleet.add("a")
    info = fleet.infos["a"]
    reader, writer = await asyncio.open_connection(info.host, info.port)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_a_replica_that_stops_is_noticed_and_its_requests_go_on(hurried: Fleet) -> None:
    fleet = hurried
    for name in ("a", "b"):
        await fleet.add(name, manual=True)
    await fleet.connected(2)
    fleet.dispatcher.submit(request())
    await until(lambda: any(backend.requests for backend in fleet.backends.values()))
    stopped = fleet.holder()
    fleet.backends[stopped].step(3)
    await until(lambda: len(fleet.tokens.get("r", ())) == 3)
    other = "b" if stopped == "a" else "a"
    del fleet.infos[stopped]
    for task in fleet.servers[stopped]._tasks:  # it keeps its connection and says nothing any more
        task.cancel()
    await until(lambda: bool(fleet.backends[other].requests))
    fleet.backends[other].step(5)
    await until(lambda: "r" in fleet.finished)
    assert fleet.tokens["r"] == expected_tokens([1, 2, 3], 8)


async def test_a_router_that_stops_is_noticed_and_its_requests_are_freed(hurried: Fleet) -> None:
    fleet = hurried
    backend = await fleet.add("a", manual=True)
    await fleet.connected(1)
    fleet.dispatcher.submit(request())
    await until(lambda: bool(backend.requests))
    for task in [*fleet.dispatcher.directory._own_tasks]:  # it looks no more, and pings no more
        task.cancel()
    await until(lambda: backend.aborted == ["r"])
    assert fleet.servers["a"].in_flight == 0


async def test_another_version_is_told_once_and_tried_ever_more_seldom(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[float] = []

    async def other_version(channel: Any, identity: Any, replica_id: str) -> None:
        tries.append(asyncio.get_running_loop().time())
        channel.send(greeting.pack(greeting.Hello("older", identity.name, b"n")))
        await greeting.FrameReader[Any](channel, greeting.Refused, 1024).read()
        raise greeting.XloomError("version_mismatch", "another version", status=503)

    monkeypatch.setattr(directory, "introduce", other_version)
    monkeypatch.setattr(directory, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(directory, "POLL_S", 0.01)
    with caplog.at_level(logging.WARNING):
        await fleet.add("a")
        await until(lambda: len(tries) >= 5)
    lines = [record for record in caplog.records if "another version" in record.getMessage()]
    assert len(lines) == 1
    waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert all(later > earlier for earlier, later in itertools.pairwise(waits))
    assert not fleet.dispatcher.directory.links
