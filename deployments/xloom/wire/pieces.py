"""An engine step as frames: one, or several where it is too large; what can't be sent fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from xloom.protocol import Logprobs, Rows, Step, TokenChunk, XloomError
from xloom.wire.frames import MAX_REPLICA_FRAME, UNENCODABLE, pack

Failure = tuple[str, XloomError]  # a request's id, and what is wrong with its chunk


def step_frames(chunks: Sequence[TokenChunk], limit: int = MAX_REPLICA_FRAME) -> tuple[list[bytes], list[Failure]]:
    """Encoded frames of at most `limit` bytes, in order, and the requests whose chunks could not be made into any."""
    try:
        whole = pack(Step(list(chunks)))
    except UNENCODABLE as error:
        if len(chunks) == 1:
            return [], [(chunks[0].request_id, _unsendable(f"The engine's answer can't be sent: {error}"))]
    else:
        if len(whole) <= limit:
            return [whole], []
        if len(chunks) == 1:
            return _of_one(chunks[0], limit)
    middle = len(chunks) // 2
    first, failed = step_frames(chunks[:middle], limit)
    second, failed_too = step_frames(chunks[middle:], limit)
    return first + second, failed + failed_too


def _of_one(chunk: TokenChunk, limit: int) -> tuple[list[bytes], list[Failure]]:
    """Its log-probabilities first, in pieces, then the chunk without them."""
    bare = msgspec.structs.replace(chunk, logprobs=None, prompt_logprobs=None)
    try:
        frames = [pack(Rows(chunk.request_id, prompt_logprobs=rows)) for rows in _split(chunk.prompt_logprobs, limit)]
        frames += [pack(Rows(chunk.request_id, rows)) for rows in _split(chunk.logprobs, limit)]
        frames.append(pack(Step([bare])))
    except XloomError as error:
        return [], [(chunk.request_id, error)]
    if len(frames[-1]) > limit:
        return [], [(chunk.request_id, _unsendable("The tokens of one engine step are too many for a frame."))]
    return frames, []


def _split(logprobs: Logprobs | None, limit: int) -> Iterator[Logprobs]:
    if logprobs is None:
        return
    count = len(logprobs.ranks)
    if len(pack(Rows("", logprobs))) <= limit // 2:  # the other half: for the id
        yield logprobs
    elif count < 2:
        raise _unsendable("The log-probabilities of one token are too many for a frame.")
    else:
        yield from _split(logprobs.part(0, count // 2), limit)
        yield from _split(logprobs.part(count // 2, count), limit)


def _unsendable(message: str) -> XloomError:
    return XloomError("answer_unsendable", message, "Ask for fewer logprobs.", 500)
