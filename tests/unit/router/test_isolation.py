"""One request's fault never reaches another, wherever on its way it comes to light."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.fakes import FakeBackend, expected_tokens, until
from tests.fleet import Fleet, request
from xloom.protocol import Logprobs, Submit, TokenChunk, TokenRequest, XloomError
from xloom.router import dispatch
from xloom.wire.requests import MAX_REQUEST


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    made = Fleet()
    made.dispatcher.start()
    yield made
    await made.close()


async def good_beside(fleet: Fleet, backend: FakeBackend) -> None:
    """The other request of every test here goes on to its end, over the same connection."""
    backend.manual = False
    backend._wake.set()
    await until(lambda: "good" in fleet.finished)
    assert fleet.tokens["good"] == expected_tokens([1, 2, 3], 8)
    assert fleet.dispatcher.in_flight == 0
    assert len(fleet.dispatcher.directory.links) == 1
    await until(lambda: fleet.servers["a"].in_flight == 0 and not backend.requests)


async def started(fleet: Fleet, **options: Any) -> FakeBackend:
    """A replica, and a request on it that has no token yet."""
    backend = await fleet.add("a", manual=True, **options)
    await fleet.connected(1)
    fleet.dispatcher.submit(request("good"))
    await until(lambda: "good" in backend.requests)
    return backend


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 10**30},
        {"stop": ["\ud800"]},
        {"extra_args": {"a": "\ud800"}},
        {"extra_args": {"a": "x" * (MAX_REQUEST + 1)}},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
    ],
    ids=["integer", "stop", "xargs", "large", "logprobs", "prompt-logprobs"],
)
async def test_what_can_not_be_sent_is_refused_and_known_nowhere(fleet: Fleet, sampling: dict[str, Any]) -> None:
    backend = await started(fleet)
    with pytest.raises(XloomError):
        fleet.dispatcher.submit(request("bad", **sampling))
    assert fleet.dispatcher.in_flight == 1
    await good_beside(fleet, backend)


async def test_a_request_that_grew_too_large_on_its_way_fails_alone(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await fleet.add("a", manual=True)
    await fleet.connected(1)
    for name in ("bad", "good"):
        fleet.dispatcher.submit(request(name, max_tokens=12))
    await until(lambda: len(first.requests) == 2)
    first.step(2)
    await until(lambda: all(len(fleet.tokens.get(name, ())) == 2 for name in ("bad", "good")))
    encode = dispatch.encode_request

    def refuse(asked: TokenRequest) -> bytes:
        if asked.request_id == "bad":
            raise RuntimeError("a mistake")
        return encode(asked)

    monkeypatch.setattr(dispatch, "encode_request", refuse)
    await fleet.lose("a")
    await fleet.add("b")
    await until(lambda: "bad" in fleet.failed and "good" in fleet.finished)
    assert fleet.failed["bad"].code == "internal_error"
    assert fleet.tokens["good"] == expected_tokens([1, 2, 3], 12)


async def test_a_request_that_a_replica_can_not_read_fails_alone(fleet: Fleet) -> None:
    backend = await started(fleet)
    fleet.dispatcher.submit(request("bad"))
    await until(lambda: "bad" in backend.requests)
    link = fleet.dispatcher.directory.links[0]
    bombs = [b"\x91" * 10_000, msgspec.msgpack.encode({"sampling": 1}), msgspec.msgpack.encode("text")]
    refused: list[str] = []
    take = fleet.dispatcher.on_refused

    def record(link: Any, failure: Any) -> None:
        refused.append(failure.code)
        take(link, failure)

    fleet.dispatcher.on_refused = record  # type: ignore[method-assign]
    for number, body in enumerate(bombs):
        link.send(Submit(f"x{number}", body))
    await until(lambda: len(refused) == len(bombs))
    assert set(refused) == {"bad_request_frame"}
    await good_beside(fleet, backend)


class Faulty(FakeBackend):
    """Fails with what is called "bad", in a way of the test's choice."""

    def __init__(self, fault: str, **options: Any) -> None:
        super().__init__(**options)
        self.fault = fault

    async def submit(self, asked: TokenRequest) -> None:
        await super().submit(asked)
        if asked.request_id == "bad" and self.fault == "submit":
            raise RuntimeError("half taken")
        if asked.request_id == "bad" and self.fault == "message":
            raise XloomError("bad_token", "odd \ud800 text " * 1000)

    def _next(self, asked: TokenRequest) -> TokenChunk:
        chunk = super()._next(asked)
        if asked.request_id == "bad" and self.fault == "surrogate":
            chunk.stop_reason = "\ud800"
        if asked.request_id == "bad" and self.fault == "type":
            chunk.token_ids = [object()]  # type: ignore[list-item]
        if asked.request_id == "bad" and self.fault == "size":
            chunk.logprobs = Logprobs([[1] * 500_000], [[0.5] * 500_000], [1])
        return chunk


@pytest.mark.parametrize("fault", ["submit", "message", "surrogate", "type", "size"])
async def test_what_an_engine_does_wrong_with_one_request_is_that_requests(fleet: Fleet, fault: str) -> None:
    backend = await started(fleet, kind=Faulty, fault=fault)
    fleet.dispatcher.submit(request("bad"))
    await until(lambda: "bad" in backend.requests or "bad" in fleet.failed)
    backend.step(1)
    await until(lambda: "bad" in fleet.failed)
    assert fleet.failed["bad"].code in ("engine_error", "bad_token", "answer_unsendable")
    await until(lambda: fault == "message" or "bad" not in backend.requests)
    backend.requests.pop("bad", None)
    await good_beside(fleet, backend)


async def test_tokens_that_are_not_taken_end_their_requests_and_no_others(fleet: Fleet) -> None:
    backend = await started(fleet)
    taking = fleet.dispatcher.on_tokens

    def break_once(chunks: list[TokenChunk]) -> None:
        fleet.dispatcher.on_tokens = taking
        raise RuntimeError("a mistake")

    fleet.dispatcher.on_tokens = break_once
    backend.step(1)
    await until(lambda: "good" in fleet.failed)
    assert fleet.failed["good"].code == "internal_error"
    await until(lambda: not backend.requests)
    fleet.failed.clear()
    fleet.dispatcher.submit(request("good"))
    await good_beside(fleet, backend)


async def test_a_failure_that_is_not_taken_does_not_keep_others_from_theirs(fleet: Fleet) -> None:
    def refuse(request_id: str, error: XloomError) -> None:
        fleet.failed[request_id] = error
        raise RuntimeError("a mistake")

    fleet.dispatcher.on_failed = refuse
    for number in range(3):
        fleet.dispatcher.submit(request(f"r{number}"))
    await fleet.dispatcher.close()
    assert sorted(fleet.failed) == ["r0", "r1", "r2"]
    assert fleet.dispatcher.in_flight == 0


async def test_a_large_answer_comes_whole_and_others_come_between(fleet: Fleet) -> None:
    values = Logprobs([[number] * 2000 for number in range(300)], [[0.25] * 2000 for _ in range(300)], list(range(300)))

    class Wordy(FakeBackend):
        def _next(self, asked: TokenRequest) -> TokenChunk:
            chunk = super()._next(asked)
            if asked.request_id == "wordy" and len(self.tokens.get("wordy", ())) == 4:
                chunk.prompt_logprobs = values
            return chunk

    chunks: dict[str, list[TokenChunk]] = {}
    backend = await started(fleet, kind=Wordy)
    taking = fleet.dispatcher.on_tokens

    def keep(step: list[TokenChunk]) -> None:
        for chunk in step:
            chunks.setdefault(chunk.request_id, []).append(chunk)
        taking(step)

    fleet.dispatcher.on_tokens = keep
    fleet.dispatcher.submit(request("wordy"))
    await until(lambda: "wordy" in backend.requests)
    await good_beside(fleet, backend)
    assert chunks["wordy"][0].prompt_logprobs == values
    assert all(chunk.prompt_logprobs is None for chunk in chunks["wordy"][1:])
    assert all(not link.rows for link in fleet.dispatcher.directory.links)


async def test_figures_that_can_not_be_had_do_not_make_a_replica_silent(fleet: Fleet) -> None:
    backend = await started(fleet)

    def broken() -> Any:
        raise RuntimeError("no figures")

    backend.stats = broken  # type: ignore[method-assign]
    reports: list[bool] = []
    fleet.dispatcher.on_figures = lambda: reports.append(True)
    await until(lambda: len(reports) > 1)
    await good_beside(fleet, backend)
