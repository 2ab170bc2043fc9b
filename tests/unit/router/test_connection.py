"""What may be sent on a connection before the application hears of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from xloom.router.limits import BodyLimits
from xloom.router.listener import HttpListener
from xloom.settings import LimitSettings


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says the size of a body, but refuses one unread where the path says so."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    size = 0
    if scope["path"] != "/refused":
        size = len((await receive())["body"])
    await send({"type": "http.response.start", "status": 401 if scope["path"] == "/refused" else 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@asynccontextmanager
async def listening(**limits: Any) -> AsyncIterator[HttpListener]:
    settings = LimitSettings(**limits)
    limited = BodyLimits(app, settings)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        await (app if scope.get("path") == "/refused" else limited)(scope, receive, send)

    listener = HttpListener(guarded, "127.0.0.1", 0, "mine", settings)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.close()


async def talk(listener: HttpListener, *parts: bytes) -> tuple[int, bytes]:
    """Send parts until the other end closes or all are sent; the status and the body of what came until the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        answer = b""
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def code(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


async def test_a_header_without_end_is_refused_as_it_comes() -> None:
    async with listening(header_bytes=4096) as listener:
        status, body = await talk(listener, HEAD, b"x: ", b"a" * 5000)
        assert (status, code(body)) == (431, "headers_too_large")
        status, body = await talk(listener, HEAD, b"x: " + b"a" * 5000 + b"\r\n\r\n")
        assert (status, code(body)) == (431, "headers_too_large")
        status, body = await talk(listener, b"GET /" + b"a" * 5000)
        assert (status, code(body)) == (431, "headers_too_large")


async def test_more_headers_than_anybody_needs_are_refused() -> None:
    async with listening() as listener:
        lines = b"".join(b"x-%d: a\r\n" % number for number in range(300))
        status, body = await talk(listener, HEAD + lines + b"connection: close\r\n\r\n")
        assert (status, code(body)) == (431, "headers_too_large")


async def test_trailers_and_the_frames_of_chunks_count_too() -> None:
    head = HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    async with listening(body_bytes=100_000, header_bytes=4096) as listener:
        status, body = await talk(listener, head + b"4\r\n1234\r\n0\r\nx-one: a\r\n\r\n")
        assert (status, body.split(b"\r\n")[1]) == (200, b"4")
        for endless in (b"x: a\r\n" * 1000, b";" + b"x" * 6000):
            parts = [head, b"4\r\n1234\r\n0" + (b"\r\n" if endless[:1] == b"x" else b""), *[endless] * 200]
            status, body = await talk(listener, *parts)
            assert status in (0, 413)  # cut off while it was still sending
            assert not body or code(body) == "body_too_large"


async def test_a_head_that_is_not_sent_in_time_is_given_up() -> None:
    async with listening(header_timeout_s=0.2) as listener:
        for part in (b"", HEAD):
            began = time.monotonic()
            status, body = await talk(listener, part)
            assert (status, code(body)) == (408, "request_timeout")
            assert time.monotonic() - began < 10


async def test_a_body_that_is_not_sent_in_time_is_given_up() -> None:
    async with listening(body_timeout_s=0.2) as listener:
        head = HEAD + b"content-length: 10\r\nconnection: close\r\n\r\n"
        status, body = await talk(listener, head + b"abc")
        assert (status, code(body)) == (408, "request_timeout")


async def test_a_connection_that_has_yet_to_send_gives_way_to_a_new_one() -> None:
    async with listening(connections=8) as listener:
        held = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(20)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}", trust_env=False) as http:
            assert (await http.post("/", content=b"1234")).text == "4"
        assert len(listener.server.server_state.connections) <= 8
        for _, writer in held:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def test_the_rest_of_a_refused_body_is_thrown_away_up_to_a_limit() -> None:
    async with listening(body_bytes=100_000) as listener:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.port}", trust_env=False) as http:
            assert (await http.post("/refused", content=b"a" * 90_000)).status_code == 401
            assert (await http.post("/", content=b"1234")).text == "4"  # on the same connection
        head = HEAD.replace(b"/ ", b"/refused ", 1) + b"content-length: 500000000\r\n\r\n"
        began = time.monotonic()
        await talk(listener, head, *[b"a" * 50_000] * 200)
        assert time.monotonic() - began < 10


async def test_several_requests_go_over_one_connection() -> None:
    async with listening(header_timeout_s=0.3) as listener:
        request = HEAD + b"content-length: 4\r\n\r\n1234"
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        for _ in range(3):
            writer.write(request)
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.2)  # pauses between requests, together more than a head may take
        writer.write(request + request)  # pipelined
        for _ in range(2):
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


async def test_an_upgrade_is_answered_as_any_other_request() -> None:
    async with listening() as listener:
        upgrade = b"GET /refused HTTP/1.1\r\nhost: x\r\nconnection: close, upgrade\r\nupgrade: websocket\r\n\r\n"
        assert (await talk(listener, upgrade))[0] == 401


ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """One request on a connection that may be kept; the head of its answer."""
    writer.write(ASK)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    await reader.readuntil(b"0\r\n\r\n")
    return head


async def test_an_idle_connection_is_kept_for_as_long_as_the_settings_say() -> None:
    """Balancers reuse theirs: Amazon's within 60 s, Google's within 600 s."""
    assert LimitSettings().keep_alive_s > 600
    async with listening(keep_alive_s=1) as listener:
        assert listener.server.config.timeout_keep_alive == 1
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        assert b"connection: close" not in await exchange(reader, writer)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_a_router_that_drains_keeps_no_connection() -> None:
    async with listening() as listener:
        listener.keep_connections(False)
        listener.keep_connections(False)
        deadline = time.monotonic() + 20
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            head = await exchange(reader, writer)
            if b"connection: close" in head:
                assert await asyncio.wait_for(reader.read(), 20) == b""
                writer.close()
                break
            writer.close()
            assert time.monotonic() < deadline
        listener.keep_connections(True)
        assert b"connection" not in dict(listener.server.config.encoded_headers)


async def test_a_listener_that_closes_lets_answers_end_in_the_time_it_is_given() -> None:
    going = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await going.wait()
        await send({"type": "http.response.body", "body": b"last"})

    async def answer_of(listener: HttpListener, grace_s: float, *, lets: bool) -> bytes:
        await listener.start()
        port = listener.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK)
        await reader.readuntil(b"first")
        assert listener.answers == 1
        closing = asyncio.create_task(listener.close(grace_s))
        if lets:
            with suppress(ConnectionError):
                while True:  # until it takes no more
                    _, another = await asyncio.open_connection("127.0.0.1", port)
                    another.close()
            going.set()
        with suppress(ConnectionError):
            rest = await asyncio.wait_for(reader.read(), 20)
        await closing
        writer.close()
        return rest

    assert b"last" in await answer_of(HttpListener(slow, "127.0.0.1", 0, "test", LimitSettings()), 20, lets=True)
    going.clear()
    assert b"last" not in await answer_of(HttpListener(slow, "127.0.0.1", 0, "test", LimitSettings()), 1, lets=False)
