"""Sessions on an `LLMBackend`, all at once: how fast their tokens come, and when each one's first."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xloom.engines.base import LLMBackend
from xloom.protocol import AdapterRef, TokenRequest

_numbers = itertools.count()


@dataclass
class Session:
    """One request and what became of it; times in seconds of `time.perf_counter`."""

    request: TokenRequest
    submitted: float = 0.0
    first: float | None = None
    finish_reason: str | None = None
    made: int = 0  # tokens

    @property
    def held(self) -> int:
        """Tokens it holds keys and values of: none before its first and after its last."""
        running = self.first is not None and self.finish_reason is None
        return len(self.request.prompt_token_ids) + self.made if running else 0


@dataclass
class Burst:
    """Sessions that were submitted together."""

    sessions: list[Session]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(session.made for session in self.sessions) / self.seconds

    @property
    def complete(self) -> int:
        """Sessions that came to their full length."""
        return sum(session.finish_reason == "length" for session in self.sessions)

    @property
    def first_token_ms(self) -> list[float]:
        return [1e3 * (s.first - s.submitted) for s in self.sessions if s.first is not None]

    @property
    def median_first_token_ms(self) -> float:
        return statistics.median(self.first_token_ms)


@dataclass
class Driver:
    """Sends sessions to one engine and waits for them all; `after_step` sees them after each of its steps."""

    backend: LLMBackend
    after_step: Callable[[Sequence[Session]], None] | None = None
    _sessions: dict[str, Session] = field(default_factory=dict)
    _left: int = 0
    _done: asyncio.Event = field(default_factory=asyncio.Event)
    _pump: asyncio.Task[None] | None = None

    async def _read(self) -> None:
        async for step in self.backend.steps():
            now = time.perf_counter()
            for chunk in step:
                session = self._sessions[chunk.request_id]
                if session.first is None:
                    session.first = now
                session.made += len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    session.finish_reason = chunk.finish_reason
                    self._left -= 1
            if self.after_step is not None:
                self.after_step(list(self._sessions.values()))
            if self._left == 0:
                self._done.set()

    async def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], adapter: AdapterRef | None = None
    ) -> Burst:
        """Submit one session for each prompt, greedy and to its full length, and wait for the last token."""
        if self._pump is None:
            self._pump = asyncio.create_task(self._read())
        sessions = [
            Session(
                TokenRequest(
                    f"session-{next(_numbers)}",
                    list(prompt),
                    {"temperature": 0.0, "max_tokens": count, "ignore_eos": True},
                    adapter,
                )
            )
            for prompt, count in zip(prompts, new_tokens, strict=True)
        ]
        self._sessions = {session.request.request_id: session for session in sessions}
        self._left = len(sessions)
        self._done.clear()
        start = time.perf_counter()
        for session in sessions:
            session.submitted = time.perf_counter()
            await self.backend.submit(session.request)
        waiting = asyncio.create_task(self._done.wait())
        await asyncio.wait({waiting, self._pump}, return_when=asyncio.FIRST_COMPLETED)
        if self._pump.done():  # the engine has died: its error
            waiting.cancel()
            self._pump.result()
        return Burst(sessions, time.perf_counter() - start)

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
        await self.backend.close()
