"""What a body may ask for: refused from its bytes alone, with a code and the setting to raise."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from xloom.protocol import XloomError
from xloom.router.body import check_body
from xloom.router.limits import BodyLimits
from xloom.settings import LimitSettings

LIMITS = LimitSettings()


def refusal(body: bytes | dict[str, Any], limits: LimitSettings = LIMITS) -> XloomError:
    with pytest.raises(XloomError) as raised:
        check_body(body if isinstance(body, bytes) else json.dumps(body).encode(), limits)
    return raised.value


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {"type": "string"}


GOOD: list[dict[str, Any]] = [
    {"prompt": "Hello", "max_tokens": 4, "stop": ["\n"], "logit_bias": {"5": 1.5}, "n": 2, "logprobs": 5},
    {"prompt": [65] * 131_072},
    {"prompt": [[65, 66], [67]]},
    {"prompt": [65] * 8000, "echo": True, "logprobs": 1, "max_tokens": 1},
    {"prompt": "a" * 20_000, "prompt_logprobs": 5, "n": 1},
    {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20, "max_tokens": 6_000},
    {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20},
    {"prompt": [65] * 2000, "echo": True, "logprobs": 1, "stream": True},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 4000}]},
    {"prompt": ["a"] * 64, "n": 2, "logprobs": 5, "max_tokens": 16},
    {"prompt": ["a", "b"], "temperature": 1e-3, "seed": 2**63 - 1},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello \U0001f600"}]}] * 100},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(12)}}] * 20},
    {"input": [{"role": "user", "content": "hello"}], "text": {"format": {"type": "text"}}},
    {"structured_outputs": {"choice": ["a", "b"]}},
    {"token_ids": [1, 2, 3], "sampling_params": {"n": 4, "stop": "x"}},
]


@pytest.mark.parametrize("body", GOOD, ids=lambda body: json.dumps(body)[:40])
def test_what_people_ask_for_passes(body: dict[str, Any]) -> None:
    check_body(json.dumps(body).encode(), LIMITS)
    check_body(json.dumps(body, ensure_ascii=False).encode(), LIMITS)


@pytest.mark.parametrize(
    ("body", "setting"),
    [
        ({"prompt": "a" * (LIMITS.prompt_characters + 1)}, "prompt_characters"),
        ({"messages": [{"role": "user", "content": "a" * 2000}] * 400}, "prompt_characters"),
        ({"messages": [{"role": "user", "content": "a"}] * 10_000}, "json_values"),
        ({"messages": [{"role": "user", "content": "a"}] * 2000}, "messages"),
        ({"messages": [[{"role": "user", "content": "a"}]] * 200}, "prompts"),
        ({"prompt": ["a"] * 129}, "prompts"),
        ({"prompt": ["a"] * 100, "n": 100}, "sequences"),
        ({"prompt": [65] * 300_001}, "token_ids"),
        ({"prompt": "a", "n": 129}, "n"),
        ({"prompt": "a", "best_of": 10**6}, "n"),
        ({"prompt": "a", "prompt_logprobs": 10**6}, "logprobs"),
        ({"prompt": [65] * 8000, "prompt_logprobs": 20}, "logprob_values"),
        ({"prompt": [[65] * 2000] * 100, "echo": True, "logprobs": 1}, "logprob_values"),
        ({"token_ids": [65] * 8000, "sampling_params": {"prompt_logprobs": 20}}, "logprob_values"),
        ({"prompt": "a" * 200_000, "prompt_logprobs": 0, "n": 2}, "logprob_values"),
        ({"prompt": "a", "n": 128, "max_tokens": 8000, "logprobs": 20}, "logprob_values"),
        ({"messages": [], "logprobs": True, "top_logprobs": 20, "max_tokens": 32_000}, "logprob_values"),
        ({"prompt": "a", "logprob_token_ids": [5] * 100, "max_tokens": 8000}, "logprob_values"),
        ({"prompt": [65] * 8000, "echo": True, "logprobs": 1, "stream": True}, "logprob_values"),
        ({"messages": [{"role": "user", "content": [{"type": 5}] * 9000}]}, "message_parts"),
        ({"input": [{"content": [{"type": "tool_result", "content": [{}] * 4096}]}]}, "message_parts"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}] * 4096}]}, "message_parts"),
        ({"prompt": "a" * 100_000, "return_token_strs": True}, "prompt_characters"),
        ({"prompt": "a", "stop": ["a"] * 65}, "stop_strings"),
        ({"prompt": "a", "bad_words": ["a"] * 65}, "stop_strings"),
        ({"prompt": "a", "stop": "a" * 1025}, "stop_characters"),
        ({"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"prompt": "a", "tools": [{}] * 129}, "tools"),
        ({"prompt": "a", "structured_outputs": {"regex": "a" * 2**20}}, "schema_bytes"),
        ({"prompt": "a", "response_format": {"json_schema": {"schema": {"title": "a" * 2**20}}}}, "schema_bytes"),
        ({"prompt": "a", "vllm_xargs": {"a": "a" * 2**20}}, "schema_bytes"),
        ({"token_ids": [1], "sampling_params": {"n": 1000}}, "n"),
        (nested(40), "json_depth"),
        ({"a": [None] * 30_000}, "json_values"),
    ],
    ids=lambda value: json.dumps(value)[:48],
)
def test_what_asks_for_more_is_refused_by_the_setting(body: dict[str, Any], setting: str) -> None:
    error = refusal(body)
    assert (error.code, error.status) == ("limit_exceeded", 400)
    assert f"router.limits.{setting}" in error.cure


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "stop": "\\ud800"}',
        b'{"prompt": "a", "bad_words": ["\\udfff"]}',
        b'{"prompt": "a", "vllm_xargs": {"a": "\\ud83d"}}',
        {"prompt": "a", "top_k": 10**30},
        {"prompt": "a", "top_k": 1e30},
        {"prompt": "a", "response_format": {"json_schema": {"schema": {"maximum": 2**64}}}},
        {"prompt": "a", "structured_outputs": {"json": {"maximum": 1e20}}},
        {"prompt": "a", "seed": -(2**63) - 1},
        {"prompt": "a", "logprobs": -1},
        {"prompt": "a", "prompt_logprobs": -1},
        {"prompt": [1, 2, None]},
        {"prompt": [1, 2, "three"]},
        {"prompt": [[1], "two"]},
        {"prompt": "a", "structured_outputs": {"choice": "a"}},
        {"prompt": "a", "structured_outputs": {"regex": 5}},
        {"prompt": "a", "structured_outputs": {"json": []}},
        b'{"prompt": ',
        b"{\xff}",
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda body: str(body)[:48],
)
def test_what_no_replica_could_be_sent_is_refused(body: bytes | dict[str, Any]) -> None:
    error = refusal(body)
    assert error.status == 400
    assert error.code in ("invalid_request", "limit_exceeded")


async def test_a_body_is_read_up_to_its_limit_and_no_further() -> None:
    received = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached")

    async def endless() -> Any:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"a" * 1024, "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    limited = BodyLimits(app, LimitSettings(body_bytes=8192))
    await limited({"type": "http", "method": "POST", "headers": []}, endless, send)
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"], received) == (413, "body_too_large", 9)
    received = 0
    declared = [(b"content-length", b"500000000")]
    await limited({"type": "http", "method": "POST", "headers": declared}, endless, send)
    assert (sent[2]["status"], received) == (413, 0)


async def test_the_application_gets_the_body_as_it_was() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    transport: Any = httpx.ASGITransport(BodyLimits(app, LIMITS))
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        for body in (b'{"prompt": "\xc3\xa9"}', b"", b'{"prompt": "' + b"a" * 300_000 + b'"}'):
            answer = await http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
            assert answer.content == body
        plain = await http.post("/v1/completions", content=b"{", headers={"Content-Type": "text/plain"})
        assert plain.content == b"{"  # its refusal is the application's


def test_the_largest_body_is_checked_in_no_time() -> None:
    body = json.dumps({"prompt": [65] * 300_000, "stop": ["a"] * 64}).encode()
    began = time.thread_time()
    check_body(body, LIMITS)
    assert time.thread_time() - began < 0.5  # of the CPU; it happens in a thread


@pytest.mark.parametrize(
    "kinds", [(b"application/json", b"text/plain"), (b"text/plain", b"application/json"), (b"Application/X+JSON",), ()]
)
async def test_a_second_content_type_hides_no_body(kinds: tuple[bytes, ...]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached")

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"n": 1000000}', "more_body": False}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", kind) for kind in kinds]
    await BodyLimits(app, LIMITS)({"type": "http", "method": "POST", "headers": headers}, receive, send)
    assert json.loads(sent[1]["body"])["error"]["code"] == "limit_exceeded"


@pytest.mark.parametrize("wanted", ["", 0, True, [], {"choice": "a"}, {"regex": 1}, {"json": []}])
def test_structured_output_of_another_type_is_refused(wanted: Any) -> None:
    assert refusal({"prompt": "a", "structured_outputs": wanted}).code == "invalid_request"
