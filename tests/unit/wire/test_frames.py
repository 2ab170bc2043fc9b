"""Frames over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from xloom.protocol import (
    Abort,
    Logprobs,
    ReplicaFrame,
    RouterFrame,
    Step,
    Submit,
    TokenChunk,
    TokenRequest,
    XloomError,
)
from xloom.wire.channel import Channel
from xloom.wire.frames import FrameReader, pack
from xloom.wire.requests import decode_request, encode_request
from xloom.wire.tcp import TCP, TcpChannel


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[TcpChannel, Channel]]:
    """Both ends of one connection."""
    accepted: asyncio.Queue[Channel] = asyncio.Queue()
    closed = asyncio.Event()

    async def serve(channel: Channel) -> None:
        accepted.put_nowait(channel)
        await closed.wait()

    listening = await TCP.listen("127.0.0.1", serve)
    reader, writer = await asyncio.open_connection(*listening.address)
    near, far = TcpChannel(reader, writer), await accepted.get()
    yield near, far
    closed.set()
    near.abort()
    far.abort()
    listening.close()


async def test_frames_come_back_as_they_were_sent() -> None:
    request = TokenRequest("r", [1, 2], {"logit_bias": {5: 1.0}, "structured_outputs": {"json": {}}})
    step = Step([TokenChunk("r", [4], "stop", "END", Logprobs([[4, 5]], [[-0.1, -2.0]], [1]))])
    async with ends() as (near, far):
        near.send(pack(Submit("r#2", encode_request(request))))
        near.send(pack(Abort(["a"])))
        near.close()
        reader: FrameReader[RouterFrame] = FrameReader(far, RouterFrame, 1 << 20)
        submit = await reader.read()
        assert isinstance(submit, Submit)
        assert submit.request_id == "r#2"
        assert decode_request(submit.body) == request
        assert await reader.read() == Abort(["a"])
        assert await reader.read() is None
        far.send(pack(step))
    async with ends() as (near, far):
        far.send(pack(step))
        assert await FrameReader(near, ReplicaFrame, 1 << 20).read() == step


async def test_a_frame_cut_short_reads_as_the_end() -> None:
    async with ends() as (near, far):
        near._writer.write((100).to_bytes(4, "big") + b"half")
        near.close()
        assert await FrameReader(far, RouterFrame, 1 << 20).read() is None


async def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    async with ends() as (near, far):
        near._writer.write((1 << 30).to_bytes(4, "big"))
        with pytest.raises(XloomError) as caught:
            await FrameReader(far, RouterFrame, 1 << 20).read()
    assert caught.value.code == "bad_frame"


@pytest.mark.parametrize("data", [b"GET", pack({"type": "nonsense"}), pack([1, 2]), b"\x91" * 100_000])
async def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    async with ends() as (near, far):
        near.send(data)
        with pytest.raises(XloomError) as caught:
            await FrameReader(far, RouterFrame, 1 << 20).read()
    assert caught.value.code == "bad_frame"


async def test_a_peer_that_does_not_read_is_cut_off() -> None:
    async with ends() as (near, _):
        near._max_unsent = 1 << 20
        for _ in range(64):
            near.send(bytes(1 << 20))
        assert near._writer.transport.is_closing()
        near.send(b"ignored")
