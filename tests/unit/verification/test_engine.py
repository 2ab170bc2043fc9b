"""One request in, its answer out, whatever else the engine does."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes import FakeBackend, expected_tokens
from xloom.protocol import AdapterRef, TokenRequest, XloomError
from xloom.verification.engine import answer, one_by_one, reading, together

CODE = AdapterRef("code", "1", "lora")


async def test_answers_come_by_adapter_and_prompt() -> None:
    backend = FakeBackend()
    prompts = [[1, 2], [3, 4, 5]]
    async with reading(backend) as ask:
        alone = [await one_by_one(ask, prompts, adapter, 4) for adapter in (None, CODE)]
        mixed = await together(ask, prompts, [None, CODE], 4)
    assert mixed == alone
    assert list(mixed[1][0].tokens) == expected_tokens([1, 2], 4, adapter="code")


async def test_a_refused_request_fails_and_the_others_go_on() -> None:
    backend = FakeBackend()
    async with reading(backend) as ask:
        with pytest.raises(XloomError) as caught:
            await answer(ask, [10**9], None, 2)
        assert caught.value.code == "bad_token"
        assert len((await answer(ask, [1], None, 2)).tokens) == 2


async def test_an_engine_that_dies_fails_who_waits_and_who_comes_later() -> None:
    backend = FakeBackend(manual=True)
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
    backend = FakeBackend(manual=True)
    async with reading(backend) as ask:
        waiting = asyncio.create_task(ask(TokenRequest("r", [1], {})))
        while not backend.requests:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert backend.aborted == ["r"]
