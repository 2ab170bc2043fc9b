"""Requests over real sockets between a dispatcher and replicas with a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.fakes import expected_tokens, until
from tests.fleet import Fleet, request
from xloom.protocol import AdapterRef


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet()
    made.dispatcher.start()
    yield made
    await made.close()


async def test_a_request_streams_to_its_end(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.connected(1)
    fleet.dispatcher.submit(request())
    await until(lambda: "r" in fleet.finished)
    assert fleet.tokens["r"] == expected_tokens([1, 2, 3], 8)
    assert fleet.dispatcher.in_flight == 0


async def test_requests_spread_over_replicas(fleet: Fleet) -> None:
    one, other = await fleet.add("a", manual=True), await fleet.add("b", manual=True)
    await fleet.connected(2)
    for number in range(10):
        fleet.dispatcher.submit(request(f"r{number}"))
    await until(lambda: len(one.requests) + len(other.requests) == 10)
    assert len(one.requests) == len(other.requests) == 5


async def test_a_lost_replica_leaves_one_unbroken_stream(fleet: Fleet) -> None:
    for name in ("a", "b"):
        await fleet.add(name, manual=True)
    await fleet.connected(2)
    fleet.dispatcher.submit(request(max_tokens=12))
    await until(lambda: any(backend.requests for backend in fleet.backends.values()))
    first = fleet.holder()
    fleet.backends[first].step(5)
    await until(lambda: len(fleet.tokens.get("r", [])) == 5)
    await fleet.lose(first)
    other = "b" if first == "a" else "a"
    await until(lambda: bool(fleet.backends[other].requests))
    fleet.backends[other].step(7)
    await until(lambda: "r" in fleet.finished)
    assert fleet.tokens["r"] == expected_tokens([1, 2, 3], 12)
    assert fleet.finished["r"] == "length"


async def test_a_request_that_can_not_move_fails_and_keeps_what_it_sent(fleet: Fleet) -> None:
    backend = await fleet.add("a", manual=True)
    await fleet.connected(1)
    fleet.dispatcher.submit(request(presence_penalty=0.5))
    await until(lambda: bool(backend.requests))
    backend.step(3)
    await until(lambda: len(fleet.tokens.get("r", [])) == 3)
    await fleet.lose("a")
    await until(lambda: "r" in fleet.failed)
    assert fleet.failed["r"].code == "replica_lost"
    assert len(fleet.tokens["r"]) == 3


async def test_an_engine_that_dies_hands_its_requests_on(fleet: Fleet) -> None:
    dying = await fleet.add("a", manual=True)
    await fleet.connected(1)
    fleet.dispatcher.submit(request())
    await until(lambda: bool(dying.requests))
    dying.step(2)
    await until(lambda: len(fleet.tokens.get("r", [])) == 2)
    await fleet.add("b")
    await fleet.connected(2)
    dying.die(RuntimeError("out of memory"))
    await until(lambda: "r" in fleet.finished)
    assert fleet.tokens["r"] == expected_tokens([1, 2, 3], 8)
    with pytest.raises(RuntimeError):
        fleet.servers["a"].check()


async def test_a_draining_replica_finishes_what_it_has_and_takes_no_more(fleet: Fleet) -> None:
    old = await fleet.add("a", manual=True)
    await fleet.connected(1)
    fleet.dispatcher.submit(request("first"))
    await until(lambda: bool(old.requests))
    drain = asyncio.create_task(fleet.servers["a"].drain(10))
    await until(lambda: any(link.draining for link in fleet.dispatcher.directory.links))
    fleet.dispatcher.submit(request("second"))
    await fleet.add("b")
    await until(lambda: "second" in fleet.finished)
    assert not drain.done()
    old.step(8)
    await until(lambda: "first" in fleet.finished)
    await asyncio.wait_for(drain, 5)


async def test_a_request_waits_for_the_first_replica(fleet: Fleet) -> None:
    starved: list[bool] = []
    fleet.dispatcher.on_starved = lambda: starved.append(True)
    fleet.dispatcher.submit(request())
    assert starved
    await fleet.add("a")
    await until(lambda: "r" in fleet.finished)


async def test_without_a_replica_a_request_fails_in_the_end() -> None:
    fleet = Fleet(ready_timeout_s=0.05)
    fleet.dispatcher.start()
    fleet.dispatcher.submit(request())
    await until(lambda: "r" in fleet.failed)
    assert fleet.failed["r"].code == "no_replica_ready"
    assert fleet.dispatcher.in_flight == 0
    await fleet.dispatcher.close()


async def test_an_aborted_request_is_freed_in_the_engine(fleet: Fleet) -> None:
    backend = await fleet.add("a", manual=True)
    await fleet.connected(1)
    fleet.dispatcher.submit(request("gone"))
    fleet.dispatcher.submit(request("stays"))
    await until(lambda: len(backend.requests) == 2)
    fleet.dispatcher.abort(["gone", "never-was"])
    await until(lambda: backend.aborted == ["gone"])
    backend.step(8)
    await until(lambda: "stays" in fleet.finished)
    assert "gone" not in fleet.tokens


async def test_a_router_that_leaves_frees_all_it_held(fleet: Fleet) -> None:
    backend = await fleet.add("a", manual=True)
    await fleet.connected(1)
    for number in range(3):
        fleet.dispatcher.submit(request(f"r{number}"))
    await until(lambda: len(backend.requests) == 3)
    await fleet.dispatcher.close()
    await until(lambda: not backend.requests)
    assert fleet.servers["a"].in_flight == 0


async def test_one_bad_request_fails_alone(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.connected(1)
    fleet.dispatcher.submit(request("bad", [10**9]))
    fleet.dispatcher.submit(request("good"))
    await until(lambda: "bad" in fleet.failed and "good" in fleet.finished)
    assert fleet.failed["bad"].code == "bad_token"


async def test_a_wrong_token_gets_no_connection(fleet: Fleet) -> None:
    await fleet.add("a", token="another")
    await fleet.add("b")
    await fleet.connected(1)
    assert [link.info.replica_id for link in fleet.dispatcher.directory.links] == ["b"]
    assert not list(fleet.servers["a"]._connections)


async def test_tokens_of_all_requests_come_in_one_frame_per_step(fleet: Fleet) -> None:
    backend = await fleet.add("a", manual=True)
    await fleet.connected(1)
    frames: list[int] = []
    fleet.dispatcher.on_tokens = lambda chunks: frames.append(len(chunks))
    for number in range(16):
        fleet.dispatcher.submit(request(f"r{number}"))
    await until(lambda: len(backend.requests) == 16)
    backend.step(8)
    await until(lambda: sum(frames) == 128)
    assert frames == [16] * 8


class Held:
    """The adapters of a replica: those named, and no others will come."""

    def __init__(self, *refs: AdapterRef) -> None:
        self.resident = set(refs)

    async def arrival(self, ref: AdapterRef) -> bool:
        return ref in self.resident


async def test_a_request_for_what_was_replaced_on_its_way_is_served_with_what_took_its_place(fleet: Fleet) -> None:
    old, new = AdapterRef("code", "old", "lora"), AdapterRef("code", "new", "lora")
    backend = await fleet.add("a")
    fleet.servers["a"]._adapters = Held(new)
    await fleet.connected(1)
    fleet.dispatcher.newest = lambda ref: new
    fleet.dispatcher.submit(request(adapter=old))
    await until(lambda: "r" in fleet.finished)
    assert not fleet.failed
    assert fleet.tokens["r"] == expected_tokens([1, 2, 3], 8, adapter="code")
    assert not backend.requests


async def test_a_request_for_what_was_removed_on_its_way_fails_once(fleet: Fleet) -> None:
    await fleet.add("a")
    fleet.servers["a"]._adapters = Held()
    await fleet.connected(1)
    fleet.dispatcher.newest = lambda ref: None
    fleet.dispatcher.submit(request(adapter=AdapterRef("code", "old", "lora")))
    await until(lambda: "r" in fleet.failed)
    assert (fleet.failed["r"].code, fleet.failed["r"].status) == ("adapter_not_found", 404)
