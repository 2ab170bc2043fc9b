"""The mistral.rs backend: its engine in this process, through the `mistralrs` wheel. No KV pages on CPU, no X-LoRA.

mistral.rs takes and gives text. It is loaded with a tokenizer in which each token is one character
(`folder.py`), so tokens go in and come out as they are. What that costs: grammars, stop strings and chat
templates of mistral.rs itself can't be used; log-probabilities are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.engines.base import Capabilities, Device, IsqCase, LLMBackend
from xloom.engines.mistralrs.folder import (
    eos_tokens,
    model_folder,
    read_config,
    text_of,
    tokens_of,
)
from xloom.engines.mistralrs.isq import ISQ_CASES, isq_name
from xloom.engines.mistralrs.runner import load_runner
from xloom.engines.mistralrs.sampling import Stops, request_options, stops, token_limit
from xloom.engines.prompt import check_prompt
from xloom.protocol import AdapterRef, EngineStats, TokenChunk, TokenRequest, XloomError

if TYPE_CHECKING:
    from xloom.settings import EngineSettings, IsqSettings, ModelSettings

logger = logging.getLogger(__name__)

INSTALL = "mistral.rs is not installed: pip install 'xloom[mistralrs]'"
STUCK_S = 300.0  # no token of any running request for this long


@dataclass
class _Job:
    """One request on its way."""

    request: TokenRequest
    options: dict[str, Any]
    stops: Stops
    left: int  # tokens it may still make
    cancelled: bool = False  # set by the loop, read by the request's thread


@dataclass
class _Loaded:
    alias: str
    generation: Any = field(default=None)  # mistral.rs's own name of the weights


class MistralRsBackend(LLMBackend):
    """A `mistralrs.Runner` (0.9.5): a thread for each running request reads its stream."""

    def __init__(
        self, runner: Any, vocabulary: int, max_model_len: int, max_num_seqs: int, eos: frozenset[int]
    ) -> None:
        self._runner: Any = runner
        self._vocabulary, self._max_model_len, self._max_num_seqs = vocabulary, max_model_len, max_num_seqs
        self._eos = eos
        self._loop = asyncio.get_running_loop()
        self._runner_lock = threading.Lock()  # its methods borrow it mutably: two at once fail with "Already borrowed"
        self._jobs: dict[str, _Job] = {}  # running and waiting
        self._waiting: deque[_Job] = deque()
        self._threads = 0
        self._arrived: deque[tuple[_Job, TokenChunk]] = deque()  # filled by threads, emptied by the loop
        self._wake = asyncio.Event()
        self._signalled = False
        self._adapters: dict[AdapterRef, _Loaded] = {}
        self._last_token = time.monotonic()
        self._dead: XloomError | None = None

    @classmethod
    def capabilities(cls) -> Capabilities:
        # mistral.rs pages on CUDA and Metal, not on CPU; no page figures come out of it anywhere.
        return Capabilities(
            paged_attention=False,
            xlora=(),
            devices=("cpu", "cuda", "metal"),
            isq={device: frozenset[IsqCase](ISQ_CASES) for device in ("cpu", "cuda", "metal")},
        )

    @classmethod
    def missing(cls) -> str | None:
        return INSTALL if importlib.util.find_spec("mistralrs") is None else None

    @classmethod
    def device(cls) -> Device:
        if sys.platform == "darwin":
            return "metal"
        try:  # CUDA builds are wheels of their own, the lane in their local version: 0.9.5+cuda130
            version = importlib.metadata.version("mistralrs")
        except importlib.metadata.PackageNotFoundError:
            return "cpu"
        return "cuda" if "+cu" in version else "cpu"

    @classmethod
    async def load(
        cls,
        model: ModelSettings,
        engine: EngineSettings,
        *,
        xlora: bool,
        max_lora_rank: int,
        isq: IsqSettings | None = None,
    ) -> MistralRsBackend:
        cls.require()
        if xlora:
            raise _no_xlora()
        if engine.tensor_parallel_size > 1:
            raise XloomError(
                "unsupported_setting",
                "The mistralrs backend runs on one device.",
                "Set engine.tensor_parallel_size to 1, or serve with engine.backend: vllm.",
            )
        source = await asyncio.to_thread(model_folder, model.source, model.revision)
        config = read_config(source)
        context = min(engine.max_model_len, int(config.get("max_position_embeddings", engine.max_model_len)))
        if context < engine.max_model_len:
            logger.warning("max_model_len %d lowered to the model's own %d", engine.max_model_len, context)
        runner = await asyncio.to_thread(load_runner, source, engine, max_lora_rank, isq_name(isq, source))
        logger.info("engine ready: %s on mistral.rs", model.source)
        return cls(runner, config["vocab_size"], context, engine.max_num_seqs, eos_tokens(source, config))

    async def submit(self, request: TokenRequest) -> None:
        prompt = request.prompt_token_ids
        check_prompt(prompt, vocabulary=self._vocabulary, max_model_len=self._max_model_len)
        options = request_options(request.sampling)
        if request.cache_salt:
            raise XloomError(
                "unsupported_setting",
                "The mistralrs backend can't keep prefix caches apart.",
                "Leave cache_salt out, or serve with engine.backend: vllm.",
            )
        if request.adapter is not None:
            loaded = self._adapters.get(request.adapter)
            if loaded is None:
                raise XloomError(
                    "adapter_not_found", f"This engine does not hold the adapter {request.adapter.name!r}.", "", 404
                )
            options["adapter"] = loaded.generation
        limit = token_limit(request.sampling, self._max_model_len - len(prompt))
        job = _Job(request, options | {"max_tokens": limit}, stops(request.sampling, self._eos), limit)
        self._jobs[request.request_id] = job
        self._waiting.append(job)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start as many waiting requests as may run at once."""
        while self._waiting and self._threads < self._max_num_seqs:
            job = self._waiting.popleft()
            if job.cancelled:
                continue
            if self._threads == 0:
                self._last_token = time.monotonic()
            self._threads += 1
            try:
                threading.Thread(target=self._read, args=(job,), name="mistralrs-stream", daemon=True).start()
            except RuntimeError as error:  # no more threads to be had
                self._threads -= 1
                self._hand_over(job, TokenChunk(job.request.request_id, [], "error", f"RuntimeError: {error}"))

    def _read(self, job: _Job) -> None:
        """In a thread of its own: one request, to its end or until it is cancelled.

        Leaving drops the stream, and mistral.rs ends a sequence whose stream has gone when it next writes to it.
        """
        try:
            if not job.cancelled:
                self._follow(job)
        except BaseException as error:  # a Rust panic is one; the other requests go on
            if job.cancelled:
                return
            logger.exception("request %s failed in mistral.rs", job.request.request_id)
            self._hand_over(job, TokenChunk(job.request.request_id, [], "error", f"{type(error).__name__}: {error}"))
        finally:
            with contextlib.suppress(RuntimeError):  # closed meanwhile: the loop may be gone
                self._loop.call_soon_threadsafe(self._thread_ended)

    def _follow(self, job: _Job) -> None:
        import mistralrs

        message = {"role": "user", "content": text_of(job.request.prompt_token_ids)}  # the template is the content
        request = mistralrs.ChatCompletionRequest(messages=[message], model="default", stream=True, **job.options)
        with self._runner_lock:
            stream = self._runner.send_chat_completion_request(request)
        for answer in stream:
            if job.cancelled:
                return
            choice = answer.choices[0]
            chunk = _chunk(job, tokens_of(choice.delta.content or ""), choice.finish_reason)
            if chunk.token_ids or chunk.finish_reason is not None:
                self._hand_over(job, chunk)
            if chunk.finish_reason is not None:
                return
        raise RuntimeError("the stream ended before the request did")

    def _hand_over(self, job: _Job, chunk: TokenChunk) -> None:
        self._arrived.append((job, chunk))
        if not self._signalled:
            self._signalled = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def _thread_ended(self) -> None:
        self._threads -= 1
        self._start_waiting()

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            job = self._jobs.pop(request_id, None)
            if job is not None:
                job.cancelled = True

    async def steps(self) -> AsyncIterator[list[TokenChunk]]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._signalled = False  # before emptying: what arrives from here on signals anew
            if self._dead is not None:
                raise self._dead
            chunks = self._take_arrived()
            if chunks:
                self._last_token = time.monotonic()
                yield chunks

    def _take_arrived(self) -> list[TokenChunk]:
        """What has arrived since the last step: one chunk a request."""
        found: dict[str, TokenChunk] = {}
        while self._arrived:
            job, chunk = self._arrived.popleft()
            if job.cancelled:
                continue
            earlier = found.get(chunk.request_id)
            if earlier is None:
                found[chunk.request_id] = chunk
            else:
                earlier.token_ids += chunk.token_ids
                earlier.finish_reason, earlier.stop_reason = chunk.finish_reason, chunk.stop_reason
            if chunk.finish_reason is not None:
                self._jobs.pop(chunk.request_id, None)
        return list(found.values())

    def stats(self) -> EngineStats:
        waiting = sum(not job.cancelled for job in self._waiting)
        return EngineStats(
            running=len(self._jobs) - waiting,
            waiting=waiting,
            adapters=[ref.key for ref in self._adapters],
        )

    async def add_adapter(self, ref: AdapterRef, path: Path) -> None:
        if ref.is_mixture:
            raise _no_xlora()
        if ref in self._adapters:
            return
        alias = hashlib.sha256(ref.key.encode()).hexdigest()[:32]  # it limits their length
        try:
            info = await asyncio.to_thread(self._load_adapter, alias, path)
        except Exception as error:  # the engine goes on; the message is mistral.rs's own
            raise XloomError(
                "adapter_load_failed",
                f"The engine refused the adapter {ref.name!r}: {error}",
                "See docs/errors.md.",
                400,
            ) from error
        self._adapters[ref] = _Loaded(alias, info.exact())

    def _load_adapter(self, alias: str, path: Path) -> Any:
        with self._runner_lock:
            return self._runner.load_lora_adapter(alias, str(path))

    async def remove_adapter(self, ref: AdapterRef) -> None:
        loaded = self._adapters.pop(ref, None)
        if loaded is not None:
            await asyncio.to_thread(self._unload_adapter, loaded.alias)

    def _unload_adapter(self, alias: str) -> None:
        with self._runner_lock:
            self._runner.unload_lora_adapter(alias)

    async def check_health(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._threads and time.monotonic() - self._last_token > STUCK_S:
            message = f"mistral.rs has made no token for {STUCK_S:.0f} s."
            raise XloomError("engine_dead", message, "The replica restarts by itself.", 503)

    async def close(self) -> None:
        await self.abort(list(self._jobs))
        self._waiting.clear()
        for _ in range(100):  # each thread leaves at its next token
            if not self._threads:
                break
            await asyncio.sleep(0.05)
        self._dead = XloomError("engine_dead", "The engine was closed.", "", 503)
        self._wake.set()
        self._runner = None


def _chunk(job: _Job, tokens: list[int], finish_reason: str | None) -> TokenChunk:
    """The chunk of some new tokens, cut where the request ends. Updates how many are left."""
    request_id = job.request.request_id
    for number, token in enumerate(tokens[: job.left], 1):
        ended, reason = job.stops.reason(token)
        if ended:
            return TokenChunk(request_id, tokens[:number], "stop", reason)
    tokens = tokens[: job.left]
    job.left -= len(tokens)
    if job.left <= 0 or finish_reason == "length":
        return TokenChunk(request_id, tokens, "length")
    if finish_reason is not None:  # it knows of no other end
        return TokenChunk(request_id, tokens, "error", f"mistral.rs ended it: {finish_reason}")
    return TokenChunk(request_id, tokens)


def _no_xlora() -> XloomError:
    return XloomError(
        "unsupported_by_backend",
        "The backend 'mistralrs' can't do X-LoRA.",
        "Set engine.backend to vllm or transformers.",
    )
