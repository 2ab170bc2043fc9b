"""Hostile requests, sent by a process of their own: one that builds and sends 80 MB reads no good stream meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

import httpx

from ..served import API_KEY

KEY = {"Authorization": f"Bearer {API_KEY}"}


def doubled(depth: int) -> dict[str, Any]:
    """A schema of 2^depth branches."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [{"type": "object", "properties": {name: schema}} for name in "ab"]}
    return schema


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "Hello", "max_tokens": 2, **fields}


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
LONG = "long " * 4_000_000  # 20 MB
HOSTILE: dict[str, tuple[str, Any, set[int]]] = {
    "twenty megabytes to tokenise": ("/tokenize", {"model": "base", "prompt": LONG}, {413}),
    "half a megabyte to tokenise": ("/tokenize", {"model": "base", "prompt": LONG[:520_000]}, {200, 400}),
    "arguments of 70 MB": ("/v1/completions", completion(vllm_xargs={"a": LONG * 3}), {413}),
    "a doubled schema": ("/v1/completions", completion(structured_outputs={"json": doubled(14)}), {400}),
    "a regex of 100 kB": ("/v1/completions", completion(structured_outputs={"regex": "(ab|c)?" * 14_000}), {400}),
    "a regex of a million repetitions": (
        "/v1/completions",
        completion(structured_outputs={"regex": "((a{1,400}){1,400}b){1,400}"}),
        {200, 400},
    ),
    "a schema for another library": (
        "/v1/completions",
        completion(structured_outputs={"json": {"type": "integer", "multipleOf": 3}}),
        {400},
    ),
    "a grammar for the first library": (  # which a schema for another would have put out of use
        "/v1/completions",
        completion(structured_outputs={"grammar": 'root ::= "a" | "b"'}),
        {200},
    ),
    "10,000 messages": (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "a"}] * 10_000},
        {400},
    ),
    "10,000 prompts": ("/v1/completions", completion(prompt=["a"] * 10_000), {400}),
    "a million answers": ("/v1/completions", completion(n=10**6), {400}),
    "a number beyond 64 bits": ("/v1/completions", completion(top_k=10**30), {400}),
    "one in a schema": ("/v1/completions", completion(structured_outputs={"json": {"maximum": 2**64}}), {400}),
    "a surrogate in stop": ("/v1/completions", b'{"model":"base","prompt":"a","stop":"\\ud800"}', {400}),
    "a surrogate in bad_words": ("/v1/completions", b'{"model":"base","prompt":"a","bad_words":["\\udfff"]}', {400}),
    "a transfer that is text": ("/v1/completions", completion(vllm_xargs={"kv_transfer_params": "a"}), {400}),
    "deep JSON in a string": (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        {400},
    ),
    "a choice that is text": ("/v1/completions", completion(structured_outputs={"choice": "a"}), {400}),
    "deep JSON": ("/invocations", b'{"a":' * 100_000, {400}),
    "all log-probabilities": ("/v1/completions", completion(prompt_logprobs=-1), {400}),
    "an adapter with a newline": (
        "/v1/load_lora_adapter%0A",
        {"lora_name": "gamma", "lora_path": "/tmp/nowhere"},
        {403},
    ),
    "a route of vLLM's": ("/scale_elastic_ep", {"new_data_parallel_size": 2}, {404}),
}


async def attack(http: httpx.AsyncClient, name: str) -> None:
    route, body, expected = HOSTILE[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        answer = await http.post(route, content=content, headers={"Content-Type": "application/json", **KEY})
    except httpx.TransportError:
        assert 413 in expected, name  # closed while the body was still being sent
        return
    assert answer.status_code in expected, (name, answer.status_code, answer.text[:300])
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, name


async def half_sent(port: int) -> None:
    """Connections with half a head, and with half a body and no key."""
    for start in (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n", b"GET /" + b"a" * 1000):
        opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(150)))
        for _, writer in opened:
            writer.write(start)
        for _, writer in opened:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def strangers(port: int) -> None:
    """A header without end, and a body of 500 MB without a key: what comes back, and when the other end hangs up."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
    for start, status in ((head + b"x: ", b"431"), (head + b"content-length: 500000000\r\n\r\n", b"401")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(start)
            for _ in range(400):  # 25 MB, should they be taken
                writer.write(b"a" * 65_536)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            answer = await asyncio.wait_for(reader.read(1000), 20)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert not answer or status in answer[:20], answer[:200]


async def main(port: int) -> None:
    """The hostile inputs, one after another, some at once."""
    limits = httpx.Limits(max_connections=32)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as http:
        await asyncio.gather(half_sent(port), strangers(port))
        for name in HOSTILE:
            await attack(http, name)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
