"""Ids of HTTP requests: taken or made, in every answer, and known to what is logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from xloom.observability.logs import bound
from xloom.router.errors import App, CodedErrors, Message, Receive, Scope, Send
from xloom.router.guard import Guard
from xloom.router.keys import KeyDigest, Keys
from xloom.router.request_id import HEADER, RequestIdMiddleware, request_id
from xloom.router.routes import Access


@pytest.mark.parametrize("given", ["a", "checkout-42", "0af7651916cd43dd8448eb211c80319c", "A.b_c:d-1", "x" * 128])
def test_a_sane_id_is_taken(given: str) -> None:
    assert request_id([(b"host", b"x"), (HEADER, given.encode())]) == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"two words", b"line\nbreak", b'"quoted"', b"../up", "é".encode()])
def test_any_other_is_replaced(given: bytes) -> None:
    made = request_id([(HEADER, given)])
    assert len(made) == 32
    assert made != request_id([(HEADER, given)])


@pytest.mark.parametrize("header", [(b"authorization", b"Bearer sk-123"), (b"x-api-key", b"sk-123")])
def test_a_key_is_no_id(header: tuple[bytes, bytes]) -> None:
    assert request_id([header, (HEADER, b"sk-123")]) != "sk-123"
    assert request_id([header, (HEADER, b"sk-1234")]) == "sk-1234"


def test_without_one_it_is_made() -> None:
    assert request_id([]) != request_id([])


class Inner:
    """An app that remembers what it was called with, and answers in two parts."""

    def __init__(self, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        self.seen: list[bytes] = []
        self.bound = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen = [value for name, value in scope["headers"] if name == HEADER]
        self.bound = bound()["request_id"]
        await send({"type": "http.response.start", "status": self.status, "headers": [*self.headers]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})


async def call(app: App, *headers: tuple[bytes, bytes], path: str = "/v1/models") -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": "GET", "path": path, "headers": list(headers)}, receive, send)
    return sent


def answered(sent: list[Message]) -> list[bytes]:
    return [value for name, value in sent[0]["headers"] if name.lower() == HEADER]


async def test_the_answer_and_the_app_have_the_clients_id() -> None:
    inner = Inner()
    sent = await call(RequestIdMiddleware(inner), (HEADER, b"mine"))
    assert answered(sent) == [b"mine"]
    assert inner.seen == [b"mine"]
    assert inner.bound == "mine"
    assert [message.get("body") for message in sent[1:]] == [b"one", b"two"]  # as a stream, part by part


async def test_an_id_that_is_not_sane_reaches_nobody() -> None:
    inner = Inner()
    [made] = answered(await call(RequestIdMiddleware(inner), (HEADER, b"a b"), (HEADER, b"second")))
    assert inner.seen == [made]
    assert made not in (b"a b", b"second")


async def test_an_answer_has_one_id_also_when_the_app_sets_one() -> None:
    assert answered(await call(RequestIdMiddleware(Inner(200, (b"X-Request-Id", b"theirs"))), (HEADER, b"mine"))) == [
        b"mine"
    ]


async def test_a_refused_call_has_one_too() -> None:
    keys = Keys(KeyDigest.of("key"))
    app = RequestIdMiddleware(CodedErrors(Guard(Inner(), lambda scope: Access.USER, keys, local=True)))
    sent = await call(app, (HEADER, b"mine"))
    assert sent[0]["status"] == 401
    assert answered(sent) == [b"mine"]


@pytest.mark.parametrize(("status", "told"), [(200, 0), (404, 1), (500, 1)])
async def test_error_answers_are_logged_where_requests_are(
    status: int, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "xloom.router.http")
    await call(RequestIdMiddleware(Inner(status), lines=True), path="/v1/nothing")
    assert len(caplog.records) == told
    fields: list[dict[str, Any]] = [vars(record)["fields"] for record in caplog.records]
    assert all(each["status"] == status and each["path"] == "/v1/nothing" for each in fields)
    await call(RequestIdMiddleware(Inner(status)))
    await call(RequestIdMiddleware(Inner(status), lines=True), path="/ready")  # a probe, asked all the time
    assert len(caplog.records) == told


async def test_what_is_no_request_passes() -> None:
    passed: list[Any] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    await RequestIdMiddleware(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert passed == ["lifespan"]
