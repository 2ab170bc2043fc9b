"""Any `LLMBackend` for synchronous tests: requests in; tokens, and the steps they came in, out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.engines import registry
from xloom.engines.base import LLMBackend
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.protocol import AdapterRef, Gates, TokenRequest
from xloom.settings import EngineSettings, ModelSettings

from ..models import HIDDEN

CLASSES = {
    "vllm": "xloom.vllm.engine.backend:VLLMBackend",
    "transformers": "xloom.engines.transformers.backend:TransformersBackend",
    "mistralrs": "xloom.engines.mistralrs.backend:MistralRsBackend",
}
ANSWER_S = 180  # a request under test; the first may compile


def backend_names() -> list[str]:
    """xloom's own backends and whatever else is registered."""
    return [*CLASSES, *(name for name in registry.names() if name not in CLASSES)]


def backend_class(name: str) -> type[LLMBackend]:
    """A backend by its registered name, or by its class where it isn't registered. Raises `XloomError`."""
    return registry.load_backend(name if name in registry.names() else CLASSES[name])


@dataclass
class Answer:
    """What an engine gave for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)  # per token: candidate -> log-probability
    steps: list[int] = field(default_factory=list)  # the numbers of the steps that brought tokens
    gates: list[Gates] = field(default_factory=list)  # a chunk each
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Served:
    """One backend with a model, on an event loop of its own."""

    def __init__(
        self, backend: type[LLMBackend], model: Path, *, xlora: bool, max_lora_rank: int = 32, **settings: Any
    ) -> None:
        self.model = model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._waiting: dict[str, Future[Answer]] = {}
        self.answers: dict[str, Answer] = {}
        self._count = self._steps = 0
        self._closed = False
        defaults = {"max_model_len": 128, "max_num_seqs": 8, "dtype": "float32", "compile": False}
        engine = EngineSettings(**(defaults | settings))
        try:
            self.backend: LLMBackend = self.call(
                backend.load(ModelSettings(source=str(model)), engine, xlora=xlora, max_lora_rank=max_lora_rank)
            )
        except BaseException:
            self._stop_loop()
            raise
        self._pump = asyncio.run_coroutine_threadsafe(self._read_steps(), self._loop)

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout: float = 300) -> Any:
        """Run a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    async def _read_steps(self) -> None:
        async for step in self.backend.steps():
            self._steps += 1
            for chunk in step:
                answer = self.answers.get(chunk.request_id)
                if answer is None:
                    continue
                answer.tokens += chunk.token_ids
                if chunk.token_ids:
                    answer.steps.append(self._steps)
                if chunk.gates is not None:
                    answer.gates.append(chunk.gates)
                if chunk.logprobs is not None:
                    rows = zip(chunk.logprobs.token_ids, chunk.logprobs.logprobs, strict=True)
                    answer.logprobs += [dict(zip(ids, values, strict=True)) for ids, values in rows]
                if chunk.finish_reason is not None:
                    answer.finish_reason, answer.stop_reason = chunk.finish_reason, chunk.stop_reason
                    self._waiting.pop(chunk.request_id).set_result(answer)

    def adapter(self, name: str, folder: Path) -> AdapterRef:
        """Prepare a LoRA adapter and load it."""
        prepared = folder.with_name(f"{folder.name}-prepared")
        prepare_lora(folder, linear_modules(str(self.model)), prepared, max_rank=256)
        return self.add(AdapterRef(name, "0123abcd", "lora"), prepared)

    def bundle(self, name: str, folder: Path) -> AdapterRef:
        """Prepare an X-LoRA bundle and load it."""
        return self.add(AdapterRef(name, "0123abcd", "xlora"), prepared_bundle(self.model, folder))

    def add(self, ref: AdapterRef, prepared: Path) -> AdapterRef:
        self.call(self.backend.add_adapter(ref, prepared))
        return ref

    def start(
        self,
        prompt: Sequence[int],
        adapter: AdapterRef | None = None,
        *,
        layer_gates: bool = False,
        **sampling: Any,
    ) -> tuple[str, Future[Answer]]:
        """Submit one request; greedy, to its full length, unless `sampling` says otherwise. Its id and its answer."""
        self._count += 1
        request_id = f"{id(self)}-{self._count}"
        options = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
        future: Future[Answer] = Future()
        self.answers[request_id], self._waiting[request_id] = Answer(), future
        try:
            request = TokenRequest(request_id, list(prompt), options, adapter, layer_gates=layer_gates)
            self.call(self.backend.submit(request))
        except BaseException:
            del self.answers[request_id], self._waiting[request_id]
            raise
        return request_id, future

    def generate(self, prompt: Sequence[int], adapter: AdapterRef | None = None, **sampling: Any) -> Answer:
        """Submit one request and wait for its end."""
        return self.start(prompt, adapter, **sampling)[1].result(ANSWER_S)

    def abort(self, request_id: str) -> None:
        """Stop a request; its answer stays as it was by then, and no one waits for it."""
        self.call(self.backend.abort([request_id]))
        self._waiting.pop(request_id, None)

    def close(self) -> None:
        """Stop the engine and the loop; once."""
        if self._closed:
            return
        self._closed = True
        self._pump.cancel()
        self.call(self.backend.close())
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def prepared_bundle(model: Path, folder: Path) -> Path:
    """The prepared folder of a bundle, written beside it."""
    prepared = folder.with_name(f"{folder.name}-prepared")
    prepare_bundle(
        folder, linear_modules(str(model)), prepared, hidden_size=HIDDEN, max_rank=256,
    )  # fmt: skip
    return prepared


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.01)
