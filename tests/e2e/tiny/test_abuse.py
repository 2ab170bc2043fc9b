"""Hostile requests beside good streams: each is refused, and no good stream fails, changes or stalls."""

from __future__ import annotations

import asyncio
import os
import sys
import time

import openai
import psutil
import pytest

from ...pages import ROOT
from ..served import API_KEY, TOKENS, Served, wait_until

STREAMS = 8
TOKENS_EACH = 48
STALL_S = 2.0
ROUNDS = int(os.environ.get("ABUSE_ROUNDS", "1"))  # `make abuse` sets more
TRIES = 3  # beside a busy engine a virtual machine may hold any process up for seconds
KINDS = ["base", "alpha", "beta", "blend"]


def router_memory(server: Served) -> int:
    """Resident bytes of the router's process."""
    [router] = [each for each in server.processes() if "ServeReplica" in " ".join(each.cmdline()) and is_router(each)]
    memory: int = router.memory_info().rss
    return memory


def is_router(process: psutil.Process) -> bool:
    return ":router" in " ".join(process.cmdline())


async def abuse(server: Served) -> None:
    """Hostile inputs, from another process."""
    sender = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.e2e.tiny.hostile", str(server.port), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, errors = await sender.communicate()
    finally:
        if sender.returncode is None:
            sender.kill()
    assert sender.returncode == 0, errors.decode()[-3000:]


class GoodStreams:
    """Streams that are asked for again and again: their tokens, and the longest wait for a chunk since `forget`."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._enough = asyncio.Event()
        self.answers: list[list[int]] = []  # each stream's number, and its tokens
        self.longest_s = 0.0

    def forget(self) -> None:
        """Measure the waits from here on."""
        self.longest_s = 0.0

    def end(self) -> None:
        """Each ends with the answer it is at."""
        self._enough.set()

    async def run(self) -> None:
        """Until `end`."""
        url = f"{self._server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=API_KEY, timeout=120, max_retries=0) as client:
            await asyncio.gather(*(self._stream(client, number) for number in range(STREAMS)))

    async def _stream(self, client: openai.AsyncOpenAI, number: int) -> None:
        while True:
            tokens: list[int] = []
            last = time.monotonic()
            async for chunk in await client.completions.create(
                model=KINDS[number % len(KINDS)],
                prompt=[40 + number] * 20,
                max_tokens=TOKENS_EACH,
                temperature=0,
                stream=True,
                extra_body=TOKENS,
            ):
                now = time.monotonic()
                self.longest_s, last = max(self.longest_s, now - last), now
                for choice in chunk.choices:
                    tokens += (choice.model_extra or {}).get("token_ids") or []
            self.answers.append([number, *tokens])
            if self._enough.is_set():
                return


@pytest.mark.timeout(300 + 60 * ROUNDS)
async def test_hostile_requests_touch_no_good_stream(server: Served) -> None:
    alone = GoodStreams(server)
    alone.end()
    await alone.run()
    expected = {number: tokens for number, *tokens in alone.answers}
    assert len(expected) == STREAMS
    await abuse(server)  # what is loaded once, such as the process that compiles grammars
    before = router_memory(server)

    good = GoodStreams(server)
    streams = asyncio.create_task(good.run())
    try:
        for number in range(ROUNDS):
            for tried in range(TRIES):
                good.forget()
                began, answered = time.monotonic(), len(good.answers)
                await abuse(server)
                report = (
                    f"round {number + 1} of {ROUNDS}: {time.monotonic() - began:.1f} s, "
                    f"{len(good.answers) - answered} good streams, longest wait {good.longest_s:.2f} s, "
                    f"router {router_memory(server) / 2**20:.0f} MiB (before {before / 2**20:.0f})"
                )
                print(report, flush=True)
                if good.longest_s < STALL_S:
                    break
                assert tried + 1 < TRIES, report
            assert not streams.done()
    finally:
        good.end()
        await streams
    assert len(good.answers) >= STREAMS
    for number, *tokens in good.answers:
        assert tokens == expected[number]

    server.wait_idle()
    wait_until(lambda: router_memory(server) < 1.2 * before, 30, "the router's memory as it was")
