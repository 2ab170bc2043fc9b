"""One request in, its answer out, whatever else the engine does."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes import FakeBackend, expected_tokens
from xloom.protocol import AdapterRef, Logprobs, TokenChunk, TokenRequest, XloomError
from xloom.verification.engine import answer, one_by_one, reading, together

CODE = AdapterRef("code", "1", "lora")


class ScoringBackend(FakeBackend):
    """Gives log-probabilities: each token's is its own number, negative, and a prompt's come with its first token."""

    def _next(self, request: TokenRequest) -> TokenChunk:
        first = len(self.tokens[request.request_id]) == len(request.prompt_token_ids)
        chunk = super()._next(request)
        chunk.logprobs = scored(chunk.token_ids)
        if first:
            chunk.prompt_logprobs = scored(request.prompt_token_ids[1:])
        return chunk


def scored(tokens: list[int]) -> Logprobs:
    return Logprobs([[token] for token in tokens], [[-float(token)] for token in tokens], [1] * len(tokens))


async def test_an_answer_has_the_log_probabilities_of_every_token() -> None:
    async with reading(ScoringBackend()) as ask:
        found = await answer(ask, [3, 4, 5], None, 2)
    assert found.prompt == (-4.0, -5.0)
    assert found.answer == tuple(-float(token) for token in expected_tokens([3, 4, 5], 2))


async def test_a_backend_without_log_probabilities_can_not_be_compared() -> None:
    async with reading(FakeBackend()) as ask:
        with pytest.raises(XloomError) as caught:
            await answer(ask, [3, 4, 5], None, 2)
    assert caught.value.code == "no_logprobs"


async def test_answers_come_by_adapter_and_prompt() -> None:
    backend = ScoringBackend()
    prompts = [[1, 2], [3, 4, 5]]
    async with reading(backend) as ask:
        alone = [await one_by_one(ask, prompts, adapter, 4) for adapter in (None, CODE)]
        mixed = await together(ask, prompts, [None, CODE], 4)
    assert mixed == alone
    assert list(mixed[1][0].tokens) == expected_tokens([1, 2], 4, adapter="code")


async def test_a_refused_request_fails_and_the_others_go_on() -> None:
    backend = ScoringBackend()
    async with reading(backend) as ask:
        with pytest.raises(XloomError) as caught:
            await answer(ask, [10**9], None, 2)
        assert caught.value.code == "bad_token"
        assert len((await answer(ask, [1], None, 2)).tokens) == 2


async def test_an_engine_that_dies_fails_who_waits_and_who_comes_later() -> None:
    backend = ScoringBackend(manual=True)
    async with reading(backend) as ask:
        waiting = asyncio.create_task(answer(ask, [1], None, 2))
        while not backend.requests:
            await asyncio.sleep(0)
        backend.die(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            await waiting
        with pytest.raises(RuntimeError, match="out of memory"):
            await answer(ask, [1], None, 2)


async def test_a_request_nobody_waits_for_any_more_is_aborted() -> None:
    backend = ScoringBackend(manual=True)
    async with reading(backend) as ask:
        waiting = asyncio.create_task(ask(TokenRequest("r", [1], {})))
        while not backend.requests:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert backend.aborted == ["r"]
