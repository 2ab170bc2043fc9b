"""Requests as bytes: what can't be sent, or is too much, is said before anything knows of it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest

from xloom.protocol import TokenRequest, XloomError
from xloom.wire.requests import MAX_DEPTH, MAX_ITEMS, MAX_REQUEST, decode_request, encode_request


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def test_a_request_comes_back_as_it_was() -> None:
    sampling = {"logit_bias": {5: 1.0, -3: 2.5}, "extra_args": {"a": [1, None, {"b": []}], "c": nested(MAX_DEPTH - 4)}}
    request = TokenRequest("r", [1, 2], sampling, extra={"reasoning_ended": True}, trace={"traceparent": "00"})
    assert decode_request(encode_request(request)) == request


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"temperature": 0.5, "top_k": 10**30}, "top_k holds an integer of more than 64 bits"),
        ({"stop": ["\ud800"]}, "stop holds text that is not Unicode"),
        ({"bad_words": ["fine", "\udfff"]}, "bad_words holds text"),
        ({"extra_args": {"a": {"b": "\ud800"}}}, "extra_args holds text"),
        ({"structured_outputs": {"json": {"maximum": 2**64}}}, "structured_outputs holds an integer"),
        ({"structured_outputs": {"json": {"maximum": int(1e20)}}}, "structured_outputs holds an integer"),
        ({"extra_args": nested(100_000)}, "extra_args holds lists or mappings nested too deeply"),
        ({"extra_args": {"a": object()}}, "extra_args holds what can't be sent"),
    ],
)
def test_what_can_not_be_encoded_is_named(sampling: dict[str, Any], told: str) -> None:
    with pytest.raises(XloomError) as caught:
        encode_request(TokenRequest("r", [1], sampling))
    assert caught.value.code == "unencodable_request"
    assert caught.value.status == 400
    assert told in caught.value.message


def test_a_salt_and_a_priority_are_looked_at_as_well() -> None:
    for request in (TokenRequest("r", [1], {}, cache_salt="\ud800"), TokenRequest("r", [1], {}, priority=2**70)):
        with pytest.raises(XloomError) as caught:
            encode_request(request)
        assert caught.value.code == "unencodable_request"


@pytest.mark.parametrize(
    "sampling",
    [
        {"extra_args": {"a": "x" * MAX_REQUEST}},
        {"extra_args": {"a": nested(MAX_DEPTH)}},
        {"extra_args": {"a": [[]] * (MAX_ITEMS + 1)}},
        {"extra_args": {str(number): [{}] * 1000 for number in range(1 + MAX_ITEMS // 1000)}},
    ],
    ids=["bytes", "depth", "items", "items-in-parts"],
)
def test_a_request_over_a_limit_is_refused_at_both_ends(sampling: dict[str, Any]) -> None:
    request = TokenRequest("r", [1], sampling)
    with pytest.raises(XloomError) as caught:
        encode_request(request)
    assert caught.value.code == "request_too_large"
    assert caught.value.status == 413
    with pytest.raises(XloomError) as caught:
        decode_request(msgspec.msgpack.encode(request))
    assert caught.value.code == "request_too_large"


def test_millions_of_empty_mappings_are_counted_and_not_made() -> None:
    body = msgspec.msgpack.encode(TokenRequest("r", [1], {"a": None}))
    bomb = body[:-1] + b"\xdd" + (7_000_000).to_bytes(4, "big") + b"\x80" * 7_000_000
    tracemalloc.start()
    with pytest.raises(XloomError) as caught:
        decode_request(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.code == "request_too_large"
    assert peak < 20 * 1024 * 1024


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x80", msgspec.msgpack.encode({"sampling": 1}), b"\x91" * 10_000])
def test_a_body_that_is_no_request_is_that_requests_error(body: bytes) -> None:
    with pytest.raises(XloomError) as caught:
        decode_request(body)
    assert caught.value.code == "bad_request_frame"
