"""Large answers travel in pieces, and what can't be sent fails alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from xloom.protocol import Logprobs, ReplicaFrame, Rows, Step, TokenChunk
from xloom.wire.pieces import step_frames

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ReplicaFrame)
LIMIT = 4096


def rows(count: int, candidates: int) -> Logprobs:
    return Logprobs(
        [list(range(candidates)) for _ in range(count)], [[-0.5] * candidates for _ in range(count)], [1] * count
    )


def sent(chunks: list[TokenChunk]) -> list[Any]:
    frames, failed = step_frames(chunks, LIMIT)
    assert not failed
    assert all(len(frame) <= LIMIT for frame in frames)
    return [_decoder.decode(frame) for frame in frames]


def test_a_step_is_one_frame() -> None:
    chunks = [TokenChunk(f"r{number}", [number]) for number in range(20)]
    assert sent(chunks) == [Step(chunks)]


def test_a_step_too_large_for_one_frame_keeps_its_order() -> None:
    chunks = [TokenChunk(f"r{number}", [number], logprobs=rows(1, 20)) for number in range(100)]
    frames = sent(chunks)
    assert len(frames) > 1
    assert [chunk for frame in frames for chunk in frame.chunks] == chunks


def test_a_chunk_too_large_for_one_frame_comes_after_its_rows() -> None:
    whole = TokenChunk("r", [3], "stop", logprobs=rows(1, 30), prompt_logprobs=rows(200, 20))
    *pieces, last = sent([TokenChunk("other", [1]), whole])
    assert pieces[0] == Step([TokenChunk("other", [1])])
    assert last == Step([TokenChunk("r", [3], "stop")])
    assert all(isinstance(piece, Rows) for piece in pieces[1:])
    prompt = [row for piece in pieces[1:] if piece.prompt_logprobs for row in piece.prompt_logprobs.token_ids]
    assert prompt == rows(200, 20).token_ids


@pytest.mark.parametrize(
    "bad",
    [
        TokenChunk("bad", [1], "stop", "\ud800"),
        TokenChunk("bad", [2**70]),
        TokenChunk("bad", [1], logprobs=rows(1, 5000)),
        TokenChunk("bad", [1] * 10_000),
        TokenChunk("bad", [object()]),  # type: ignore[list-item]
    ],
)
def test_a_chunk_that_can_not_be_sent_fails_alone(bad: TokenChunk) -> None:
    good = [TokenChunk(f"r{number}", [number]) for number in range(4)]
    frames, failed = step_frames([*good[:2], bad, *good[2:]], LIMIT)
    assert [request_id for request_id, _ in failed] == ["bad"]
    assert failed[0][1].code == "answer_unsendable"
    assert [chunk for frame in frames for chunk in _decoder.decode(frame).chunks] == good
