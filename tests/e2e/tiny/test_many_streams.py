"""Many streams at once, of all kinds, and streams that are left: answers hold, pages come back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest

from ..served import API_KEY, TOKENS, Served, wait_until
from ..weights import MAX_LENGTH

STREAMS = 64
NEW_TOKENS = 200  # together: long enough that each runs beside most of the others
FIRST_TOKENS = 24  # alone: but for one of each kind, only these are asked for again
KINDS = ["base", "alpha", "beta", "blend"]
ABANDONED = 8
# One second for the pages, and on top the half second between the replica's reports, through which they are seen.
FREED_S = 1.0 + 0.5
TRIES = 4  # beside a busy engine a virtual machine may hold any process up for seconds


def prompt(number: int) -> list[int]:
    """Of 30 to 93 tokens, every other one beginning as the others do."""
    own = [(7 * number + 3 * position) % 250 for position in range(30 + number)]
    return (list(range(5, 40)) + own)[: 30 + number] if number % 2 else own


async def test_64_streams_of_mixed_kinds_equal_their_answers_one_at_a_time(server: Served) -> None:
    begun, most = 0, 0  # streams that have had a token and lack their last
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, timeout=300, max_retries=0) as client:

        async def answer(number: int, length: int) -> list[int]:
            nonlocal begun, most
            stream = await client.completions.create(
                model=KINDS[number % len(KINDS)],
                prompt=prompt(number),
                max_tokens=length,
                temperature=0,
                stream=True,
                extra_body=TOKENS,
            )
            tokens: list[int] = []
            async for chunk in stream:
                for choice in chunk.choices:
                    new = (choice.model_extra or {}).get("token_ids") or []
                    begun += bool(new and not tokens)
                    tokens += new
                await asyncio.sleep(0)  # a stream that has arrived whole would else be read to its end before the next
                most = max(most, begun)
            begun -= bool(tokens)
            return tokens

        together = await asyncio.gather(*(answer(number, NEW_TOKENS) for number in range(STREAMS)))
        server.wait_idle()

        lengths = [NEW_TOKENS if number < len(KINDS) else FIRST_TOKENS for number in range(STREAMS)]
        alone = [await answer(number, length) for number, length in enumerate(lengths)]

    assert all(len(tokens) == NEW_TOKENS for tokens in together)
    assert [tokens[:length] for tokens, length in zip(together, lengths, strict=True)] == alone
    assert most > STREAMS / 2  # they did run together
    server.wait_idle()


def figures(server: Served) -> dict[str, Any]:
    """What the one replica reported last."""
    [replica] = server.status()["replicas"]
    stats: dict[str, Any] = replica["stats"]
    return stats


def seconds_until_free(server: Served, route: str, asked: dict[str, Any]) -> float:
    """Leave streams amid their tokens; from then until the replica reports that it holds nothing."""
    server.wait_idle()
    leaving = []
    with httpx.Client(base_url=server.url, timeout=180, trust_env=False) as client:
        for number in range(ABANDONED):
            request = client.build_request(
                "POST",
                f"/v1/{route}",
                headers={"Authorization": f"Bearer {API_KEY}"},
                json=asked
                | {
                    "model": KINDS[number % 4],
                    "max_tokens": MAX_LENGTH - 200,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                },
            )
            response = client.send(request, stream=True)
            assert response.status_code == 200, response.read()
            lines = response.iter_lines()
            next(lines)
            leaving.append((response, lines))  # an iterator that is dropped closes its response
        # None can have ended by itself. The report is to know of all their pages.
        wait_until(lambda: figures(server)["running"] == ABANDONED, 30, "all streams at work")
        assert figures(server)["kv_pages_used"] >= ABANDONED
        assert server.status()["router"]["in_flight"] == ABANDONED
        for response, _ in leaving:
            response.close()
        left = time.monotonic()
        server.wait_idle(60)
        return time.monotonic() - left


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_pages_of_streams_that_are_left_are_free_within_a_second(server: Served, route: str) -> None:
    asked = {"prompt": prompt(1)} if route == "completions" else {"messages": [{"role": "user", "content": "Go on."}]}
    took: list[float] = []
    while len(took) < TRIES and min(took, default=FREED_S) >= FREED_S:
        took.append(seconds_until_free(server, route, asked))
    assert min(took) < FREED_S, took
