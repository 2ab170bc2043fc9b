"""An engine as a proof sees it: one request in, the log-probabilities of prompt and answer out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from xloom.engines.base import LLMBackend
from xloom.protocol import AdapterRef, Logprobs, TokenChunk, TokenRequest, XloomError
from xloom.verification.comparison import Scores

ANSWER_TIMEOUT_S = 300.0

Ask = Callable[[TokenRequest], Awaitable[Sequence[TokenChunk]]]  # all chunks of one request, once it has ended

_numbers = itertools.count()


class Asking:
    """Requests of this process's own, beside whatever else its backend serves."""

    def __init__(self, backend: LLMBackend) -> None:
        self._backend = backend
        self._chunks: dict[str, list[TokenChunk]] = {}
        self._ended: dict[str, asyncio.Future[None]] = {}
        self._error: BaseException | None = None

    def take(self, chunk: TokenChunk) -> None:
        """A chunk of the backend's; those of others are ignored."""
        ended = self._ended.get(chunk.request_id)
        if ended is not None:
            self._chunks[chunk.request_id].append(chunk)
            if chunk.finish_reason is not None and not ended.done():
                ended.set_result(None)

    def fail(self, error: BaseException) -> None:
        """The engine has died: every request fails with its error, now and from now on."""
        self._error = error
        for ended in self._ended.values():
            if not ended.done():
                ended.set_exception(error)

    async def read(self) -> None:
        """Be the one reader of the backend's steps, where nobody else reads them, until the engine dies."""
        try:
            async for step in self._backend.steps():
                for chunk in step:
                    self.take(chunk)
        except Exception as error:
            self.fail(error)

    async def ask(self, request: TokenRequest) -> list[TokenChunk]:
        """Submit a request and wait for its end. Raises `XloomError`, and what the engine dies of."""
        if self._error is not None:
            raise self._error
        name = request.request_id
        chunks = self._chunks[name] = []
        ended = self._ended[name] = asyncio.get_running_loop().create_future()
        try:
            await self._backend.submit(request)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await ended
        except TimeoutError:
            raise unanswered(f"The engine gave no answer within {ANSWER_TIMEOUT_S:g} s.") from None
        finally:
            del self._chunks[name], self._ended[name]
            if not ended.done() or ended.cancelled():
                with contextlib.suppress(Exception):
                    await self._backend.abort([name])
        return chunks


@asynccontextmanager
async def reading(backend: LLMBackend) -> AsyncIterator[Ask]:
    """How to ask a backend, as long as it is read within."""
    asking = Asking(backend)
    task = asyncio.create_task(asking.read())
    try:
        yield asking.ask
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def unanswered(message: str) -> XloomError:
    """The engine did not answer as it should."""
    return XloomError("generation_failed", message, "See its log.", 500)


async def answer(ask: Ask, prompt: Sequence[int], adapter: AdapterRef | None, new_tokens: int) -> Scores:
    """The likeliest `new_tokens` tokens after a prompt, and all log-probabilities. Raises `XloomError`."""
    # 0 candidates beside the token itself: within any max_logprobs.
    sampling = {"temperature": 0.0, "max_tokens": new_tokens, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    chunks = await ask(TokenRequest(request_name(), list(prompt), sampling, adapter))
    if chunks[-1].finish_reason not in ("length", "stop"):
        raise unanswered(f"The engine gave an answer up ({chunks[-1].finish_reason}).")
    scores = Scores(
        prompt=tuple(value for chunk in chunks for value in _own(chunk.prompt_logprobs)),
        tokens=tuple(token for chunk in chunks for token in chunk.token_ids),
        answer=tuple(value for chunk in chunks for value in _own(chunk.logprobs)),
    )
    if len(scores.prompt) != len(prompt) - 1 or len(scores.answer) != len(scores.tokens):
        raise XloomError(
            "no_logprobs",
            "The backend does not give the log-probabilities of prompts and answers, so that nothing can be compared.",
            "Use engine.backend: vllm, or transformers.",
        )
    return scores


async def one_by_one(
    ask: Ask, prompts: Sequence[Sequence[int]], adapter: AdapterRef | None, new_tokens: int
) -> list[Scores]:
    """Answers to prompts, each alone in its batch."""
    return [await answer(ask, prompt, adapter, new_tokens) for prompt in prompts]


async def together(
    ask: Ask, prompts: Sequence[Sequence[int]], adapters: Sequence[AdapterRef | None], new_tokens: int
) -> list[list[Scores]]:
    """Answers to every prompt under every adapter (`None`: the base), all at once; by adapter, then prompt."""
    asked = [answer(ask, prompt, adapter, new_tokens) for prompt in prompts for adapter in adapters]
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        flat = await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return [flat[start :: len(adapters)] for start in range(len(adapters))]


def request_name() -> str:
    """An id that no other request of the engine has."""
    return f"proof-{uuid.uuid4().hex[:12]}-{next(_numbers)}"


def _own(logprobs: Logprobs | None) -> list[float]:
    """Each token's own log-probability: the first of its row."""
    return [] if logprobs is None else [float(row[0]) for row in logprobs.logprobs]
