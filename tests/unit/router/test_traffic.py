"""What a router counts of its requests, over real sockets and a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import FakeBackend, until
from xloom.observability import table
from xloom.observability.recorder import Recorder
from xloom.protocol import AdapterRef, TokenRequest
from xloom.replica.server import ReplicaServer
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher
from xloom.router.traffic import Traffic

CODE = AdapterRef("code", "0123abcd", "lora")


class Scene:
    """A dispatcher, its figures, and replicas that come and go."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.infos: dict[str, ReplicaInfo] = {}
        self.servers: dict[str, ReplicaServer] = {}
        traffic = Traffic(self.recorder, "sample")
        self.dispatcher = Dispatcher(self._discover, "secret", "router", ready_timeout_s=10, traffic=traffic)

    async def _discover(self) -> list[ReplicaInfo]:
        return list(self.infos.values())

    async def add(self, name: str, **options: Any) -> FakeBackend:
        backend = FakeBackend(**options)
        server = self.servers[name] = ReplicaServer(backend, name, "secret")
        self.infos[name] = ReplicaInfo(name, "node", *await server.start("127.0.0.1"), 1)
        self.dispatcher.directory.poll_now()
        await until(lambda: len(self.dispatcher.directory.links) == len(self.infos))
        return backend

    async def lose(self, name: str) -> None:
        self.infos.pop(name)
        await self.servers.pop(name).close()

    def submit(self, name: str = "r", adapter: AdapterRef | None = None, **sampling: Any) -> None:
        self.dispatcher.submit(TokenRequest(name, [1, 2, 3], {"max_tokens": 4, **sampling}, adapter))

    async def idle(self) -> None:
        await until(lambda: self.dispatcher.in_flight == 0)

    def value(self, metric: table.Metric, **labels: object) -> float:
        return self.recorder.value(metric, **labels)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    made.dispatcher.start()
    yield made
    await made.dispatcher.close()
    for server in made.servers.values():
        await server.close()


async def test_a_request_is_counted_once_with_its_tokens_and_times(scene: Scene) -> None:
    await scene.add("a")
    scene.submit()
    await scene.idle()
    labels = {"model": "sample", "kind": "base"}
    assert scene.value(table.REQUESTS, outcome="length", **labels) == scene.value(table.REQUESTS) == 1
    assert scene.value(table.PROMPT_TOKENS, **labels) == 3
    assert scene.value(table.GENERATION_TOKENS, **labels) == 4
    assert scene.value(table.TIME_TO_FIRST_TOKEN, **labels) == 1
    assert scene.value(table.INTER_TOKEN, **labels) == 3
    assert scene.value(table.REQUEST_SECONDS, **labels) == 1


async def test_adapters_have_their_own_name_and_kind(scene: Scene) -> None:
    await scene.add("a")
    scene.submit("r", CODE)
    scene.submit("x", AdapterRef("blend", "0123abcd", "xlora"))
    await scene.idle()
    assert scene.value(table.REQUESTS, model="code", kind="lora") == 1
    assert scene.value(table.GENERATION_TOKENS, model="blend", kind="xlora") == 4
    assert scene.value(table.REQUESTS, model="sample") == 0
    assert scene.value(table.PLACEMENTS, replica="a", resident="no") == 2  # the replica had not reported them


async def test_what_a_client_leaves_is_an_abort_and_a_stop_string_is_a_stop(scene: Scene) -> None:
    backend = await scene.add("a", manual=True)
    scene.submit("left")
    scene.submit("stopped")
    await until(lambda: len(backend.requests) == 2)
    scene.dispatcher.abort(["left", "unknown"])
    scene.dispatcher.abort(["stopped"], "stop")
    scene.dispatcher.abort(["left"])
    assert scene.value(table.REQUESTS, outcome="abort") == 1
    assert scene.value(table.REQUESTS, outcome="stop") == 1
    assert scene.value(table.REQUESTS) == 2
    assert scene.value(table.PROMPT_TOKENS) == 0  # no first token came


async def test_a_request_that_goes_on_elsewhere_is_one_request(scene: Scene) -> None:
    first = await scene.add("a", manual=True)
    scene.submit(max_tokens=6)
    await until(lambda: bool(first.requests))
    first.step(2)
    await until(lambda: scene.value(table.GENERATION_TOKENS) == 2)
    await scene.add("b")
    await scene.lose("a")
    await scene.idle()
    assert scene.value(table.REPLAYS, reason="replica_lost") == scene.value(table.REPLAYS) == 1
    assert scene.value(table.PLACEMENTS, replica="a") == scene.value(table.PLACEMENTS, replica="b") == 1
    assert scene.value(table.REQUESTS, outcome="length") == scene.value(table.REQUESTS) == 1
    assert scene.value(table.PROMPT_TOKENS) == 3  # not the tokens it was replayed with
    assert scene.value(table.GENERATION_TOKENS) == 6
    assert scene.value(table.TIME_TO_FIRST_TOKEN) == 1


async def test_a_request_that_can_not_go_on_is_an_error_and_no_replay(scene: Scene) -> None:
    backend = await scene.add("a", manual=True)
    scene.submit(presence_penalty=0.5)
    await until(lambda: bool(backend.requests))
    backend.step()
    await until(lambda: scene.value(table.GENERATION_TOKENS) == 1)
    await scene.lose("a")
    await scene.idle()
    assert scene.value(table.REQUESTS, outcome="error") == 1
    assert scene.value(table.REPLAYS) == 0


async def test_gauges_follow_the_requests_and_the_replicas(scene: Scene) -> None:
    assert [scene.value(each) for each in (table.ROUTER_IN_FLIGHT, table.ROUTER_WAITING, table.ROUTER_REPLICAS)] == [
        0, 0, 0,
    ]  # fmt: skip
    scene.submit()
    assert scene.value(table.ROUTER_IN_FLIGHT) == scene.value(table.ROUTER_WAITING) == 1
    await scene.add("a")
    await scene.idle()
    assert scene.value(table.ROUTER_IN_FLIGHT) == scene.value(table.ROUTER_WAITING) == 0
    assert scene.value(table.ROUTER_REPLICAS) == 1
    await scene.lose("a")
    await until(lambda: scene.value(table.ROUTER_REPLICAS) == 0)


def test_unknown_outcomes_and_reasons_become_no_label() -> None:
    recorder = Recorder()
    traffic = Traffic(recorder, "sample")
    traffic.begin(TokenRequest("r", [1], {})).end("surprise-7c1d")
    traffic.replayed("surprise-7c1d")
    assert recorder.value(table.REQUESTS, outcome="other") == recorder.value(table.REQUESTS) == 1
    assert recorder.value(table.REPLAYS, reason="other") == recorder.value(table.REPLAYS) == 1
