"""A real vLLM engine for synchronous tests: requests in, tokens and logits out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.mixtures.prepare_mixture import prepare_linear, prepare_mixture
from xloom.protocol import AdapterRef, Blend, Gates, Overrides, TokenRequest
from xloom.settings import EngineSettings, ModelSettings
from xloom.vllm.engine.backend import VLLMBackend

from ..models import HIDDEN


@dataclass
class Answer:
    """What an engine gave for one request."""

    tokens: list[int] = field(default_factory=list)
    scores: list[dict[int, float]] = field(default_factory=list)  # per token: candidate -> logit or log-probability
    finish_reason: str | None = None
    cached: int = 0
    gates: list[Gates] = field(default_factory=list)  # a chunk each


class Engine:
    """One `VLLMBackend` on an event loop of its own."""

    def __init__(self, model: Path, *, xlora: bool = True, max_lora_rank: int = 32, **settings: Any) -> None:
        self.model = model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._waiting: dict[str, Future[Answer]] = {}
        self._answers: dict[str, Answer] = {}
        self._count = 0
        engine = EngineSettings(**({"max_model_len": 512, "dtype": "float32", "compile": False} | settings))
        self.backend = self.call(
            VLLMBackend.load(ModelSettings(source=str(model)), engine, xlora=xlora, max_lora_rank=max_lora_rank)
        )
        self._pump = asyncio.run_coroutine_threadsafe(self._read_steps(), self._loop)

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout: float = 300) -> Any:
        """Run a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    async def _read_steps(self) -> None:
        async for step in self.backend.steps():
            for chunk in step:
                answer = self._answers.get(chunk.request_id)
                if answer is None:
                    continue
                answer.tokens += chunk.token_ids
                answer.cached = max(answer.cached, chunk.num_cached_tokens)
                if chunk.gates is not None:
                    answer.gates.append(chunk.gates)
                if chunk.logprobs is not None:
                    rows = zip(chunk.logprobs.token_ids, chunk.logprobs.logprobs, strict=True)
                    answer.scores += [dict(zip(ids, values, strict=True)) for ids, values in rows]
                if chunk.finish_reason is not None:
                    answer.finish_reason = chunk.finish_reason
                    self._waiting.pop(chunk.request_id).set_result(answer)

    def bundle(self, name: str, folder: Path, prepared: Path, **overrides: Any) -> AdapterRef:
        """Prepare an X-LoRA bundle and load it."""
        linears, wanted = linear_modules(str(self.model)), Overrides(**overrides)
        prepare_bundle(folder, linears, prepared, hidden_size=HIDDEN, max_rank=256, overrides=wanted)
        return self._add(AdapterRef(name, "test", "xlora"), prepared)

    def adapter(self, name: str, folder: Path, prepared: Path) -> AdapterRef:
        """Prepare a LoRA adapter and load it."""
        prepare_lora(folder, linear_modules(str(self.model)), prepared, max_rank=256)
        return self._add(AdapterRef(name, "test", "lora"), prepared)

    def mixture(
        self, name: str, routing: str, adapters: Mapping[str, Path], prepared: Path, **options: Any
    ) -> AdapterRef:
        """Prepare a mixture of adapters and load it."""
        blend = Blend(routing, dict.fromkeys(adapters, ""), **options)
        prepare_mixture(blend, adapters, linear_modules(str(self.model)), prepared, max_rank=256)
        return self._add(AdapterRef(name, "test", routing), prepared)

    def linear(self, name: str, folder: Path, prepared: Path) -> AdapterRef:
        """Prepare a learned linear router with its adapters and load it."""
        prepare_linear(folder, linear_modules(str(self.model)), prepared, max_rank=256)
        return self._add(AdapterRef(name, "test", "linear"), prepared)

    def _add(self, ref: AdapterRef, prepared: Path) -> AdapterRef:
        self.call(self.backend.add_adapter(ref, prepared))
        return ref

    def start(
        self,
        prompt: Sequence[int],
        adapter: AdapterRef | None = None,
        *,
        weights: dict[str, float] | None = None,
        layer_gates: bool = False,
        **sampling: Any,
    ) -> Future[Answer]:
        """Submit one request; greedy, to its full length, unless `sampling` says otherwise."""
        self._count += 1
        request_id = f"{id(self)}-{self._count}"
        options = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | sampling
        future: Future[Answer] = Future()
        self._answers[request_id], self._waiting[request_id] = Answer(), future
        request = TokenRequest(request_id, list(prompt), options, adapter, weights=weights, layer_gates=layer_gates)
        self.call(self.backend.submit(request))
        return future

    def generate(self, prompt: Sequence[int], adapter: AdapterRef | None = None, **sampling: Any) -> Answer:
        """Submit one request and wait for its end."""
        return self.start(prompt, adapter, **sampling).result(180)

    def close(self) -> None:
        """Stop the engine and the loop."""
        self._pump.cancel()
        self.call(self.backend.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
