"""Frames on a stream."""

from __future__ import annotations

import asyncio

import pytest

from xloom.protocol import (
    Hello,
    Logprobs,
    ReplicaFrame,
    RouterFrame,
    Step,
    Submit,
    TokenChunk,
    TokenRequest,
    XloomError,
)
from xloom.wire import FrameReader, pack


def _reader(data: bytes, kind: object, limit: int = 1 << 20) -> FrameReader:  # type: ignore[type-arg]
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    return FrameReader(stream, kind, limit)


async def test_frames_come_back_as_they_were_sent() -> None:
    request = TokenRequest("r", [1, 2], {"logit_bias": {5: 1.0}, "structured_outputs": {"json": {}}})
    step = Step([TokenChunk("r", [4], "stop", "END", Logprobs([[4, 5]], [[-0.1, -2.0]], [1]))])
    router = _reader(bytes(pack(Hello("t", "me")) + pack(Submit(request))), RouterFrame)
    assert await router.read() == Hello("t", "me")
    assert await router.read() == Submit(request)
    assert await router.read() is None
    assert await _reader(bytes(pack(step)), ReplicaFrame).read() == step


async def test_a_frame_cut_short_reads_as_the_end() -> None:
    assert await _reader(bytes(pack(Hello("t", "me"))[:-1]), RouterFrame).read() is None


async def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(XloomError) as caught:
        await _reader((1 << 30).to_bytes(4, "big"), RouterFrame).read()
    assert caught.value.code == "bad_frame"


async def test_bytes_that_are_no_frame_are_refused() -> None:
    for data in (b"\x00\x00\x00\x03GET", bytes(pack({"type": "nonsense"})), bytes(pack([1, 2]))):
        with pytest.raises(XloomError) as caught:
            await _reader(data, RouterFrame).read()
        assert caught.value.code == "bad_frame"
