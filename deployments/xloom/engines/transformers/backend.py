"""The transformers backend: a Hugging Face model in this process, on CPU, CUDA or Apple Metal. No vLLM, no Ray.

For the edge: a small install, any causal model of the hub, X-LoRA included; requests are batched, but their keys and
values lie in caches of their own, without pages. Answers equal PEFT's, which is not needed to run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.engines.base import Capabilities, Device, LLMBackend
from xloom.engines.prompt import check_prompt, no_weights
from xloom.protocol import AdapterRef, EngineStats, MixtureFigures, TokenChunk, TokenRequest, XloomError

if TYPE_CHECKING:
    from xloom.engines.transformers.model import LoadedModel
    from xloom.mixtures.hooks import Adapter
    from xloom.settings import EngineSettings, IsqSettings, ModelSettings

logger = logging.getLogger(__name__)

NEEDED = ("torch", "transformers")
CLOSE_TIMEOUT_S = 10.0


class TransformersBackend(LLMBackend):
    """A model on one device, run by a thread of this process."""

    def __init__(self, loaded: LoadedModel, engine: EngineSettings) -> None:
        from xloom.engines.transformers.batch import BatchRunner
        from xloom.engines.transformers.worker import Worker

        self._loaded = loaded
        self._modules = loaded.modules
        self._pages = engine.paged_attention.max_blocks
        self._adapters: dict[AdapterRef, Adapter] = {}
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[list[TokenChunk] | BaseException] = asyncio.Queue()
        self._dead: BaseException | None = None
        runner = BatchRunner(loaded.model, batching=loaded.batching)
        self._tally = runner.tally
        self._worker = Worker(
            runner,
            max_num_seqs=engine.max_num_seqs,
            page=engine.paged_attention.block_size,
            pages=self._pages,
            emit=self._hand_over,
            died=self._hand_over,
        )

    @classmethod
    def capabilities(cls) -> Capabilities:
        devices: tuple[Device, ...] = ("cpu", "cuda", "metal")
        return Capabilities(paged_attention=False, xlora=devices, devices=devices)

    @classmethod
    def missing(cls) -> str | None:
        absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: pip install 'xloom[edge]'" if absent else None

    @classmethod
    def device(cls) -> Device:
        # Without importing torch: what is installed, and whether there is a driver. `load` asks torch.
        if sys.platform == "darwin":
            return "metal"
        try:
            version = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            return "cpu"
        driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()  # the latter in WSL
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
        return "cuda" if driver and not hidden and not version.endswith("+cpu") else "cpu"

    @classmethod
    async def load(
        cls,
        model: ModelSettings,
        engine: EngineSettings,
        *,
        xlora: bool,
        max_lora_rank: int,
        isq: IsqSettings | None = None,
    ) -> TransformersBackend:
        cls.require()
        if isq is not None:
            cure = "Leave isq out, or serve with engine.backend: vllm."
            raise XloomError("unsupported_by_backend", "The backend 'transformers' can't do isq.", cure)
        from xloom.engines.transformers.model import load_model

        loaded = await asyncio.to_thread(load_model, model, engine)
        logger.info("engine ready: %s on %s in %s", model.source, loaded.device, loaded.dtype)
        return cls(loaded, engine)

    async def submit(self, request: TokenRequest) -> None:
        from xloom.engines.transformers.sampling import Sampler, read_sampling
        from xloom.engines.transformers.worker import Job
        from xloom.mixtures.routing.fixed import FixedRouting
        from xloom.mixtures.weights import checked_weights

        loaded = self._loaded
        check_prompt(request.prompt_token_ids, vocabulary=loaded.vocabulary, max_model_len=loaded.max_model_len)
        adapter = None
        if request.adapter is not None:
            adapter = self._adapters.get(request.adapter)
            if adapter is None:
                raise XloomError(
                    "adapter_not_found", f"This engine does not hold the adapter {request.adapter.name!r}.", "", 404
                )
        constant = None
        if request.weights is not None:
            mixture = adapter.mixture if adapter is not None else None
            if request.adapter is None or not isinstance(mixture, FixedRouting):
                raise no_weights(request)
            weights = checked_weights(request.weights, mixture.adapter_names, request.adapter.name)
            constant = mixture.gates(weights).to(loaded.device)
        sampler = Sampler(
            read_sampling(request.sampling, loaded.vocabulary),
            request.prompt_token_ids,
            eos=loaded.eos,
            max_model_len=loaded.max_model_len,
            device=loaded.device,
        )
        self._worker.submit(Job(request, sampler, adapter, constant))

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._worker.abort(request_ids)

    def _hand_over(self, step: list[TokenChunk] | BaseException) -> None:
        """From the worker's thread to the loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    async def steps(self) -> AsyncIterator[list[TokenChunk]]:
        while True:
            step = await self._steps.get()
            if isinstance(step, BaseException):
                self._dead = step
                raise XloomError("engine_dead", f"The engine has died: {step}", "See the replica's log.", 503) from step
            yield step

    def stats(self) -> EngineStats:
        running, waiting, pages = self._worker.figures()
        return EngineStats(
            running=running,
            waiting=waiting,
            kv_pages_used=pages,
            kv_pages_total=self._pages,
            adapters=[ref.key for ref in self._adapters],
        )

    async def mixture(self) -> MixtureFigures | None:
        return self._tally.take()[0]

    async def add_adapter(self, ref: AdapterRef, path: Path) -> None:
        from xloom.mixtures.hooks import Adapter

        adapter = await asyncio.to_thread(Adapter.load, path, self._loaded.device, self._loaded.dtype)
        adapter.check(self._modules)
        if adapter.routing is not None and adapter.routing.routing_passes == 1:
            raise XloomError(
                "unsupported_by_backend",
                f"The backend 'transformers' can't route {ref.name!r} in one pass.",
                "Set engine.backend to vllm, or leave routing_passes out.",
            )
        self._adapters[ref] = dataclasses.replace(adapter, name=ref.key)

    async def remove_adapter(self, ref: AdapterRef) -> None:
        self._adapters.pop(ref, None)  # requests that run with it keep it until their end

    async def check_health(self) -> None:
        if self._dead is not None or not self._worker.alive:
            raise XloomError("engine_dead", "The engine's thread has died.", "The replica restarts by itself.", 503)
        if self._loaded.device.type == "cuda":
            await asyncio.to_thread(self._touch_device)

    def _touch_device(self) -> None:
        """After a failure that CUDA doesn't recover from, every call fails."""
        import torch

        try:
            torch.ones(1, device=self._loaded.device).item()
        except RuntimeError as error:
            raise XloomError("engine_dead", f"The GPU no longer answers: {error}", "", 503) from error

    async def close(self) -> None:
        await asyncio.to_thread(self._worker.close, CLOSE_TIMEOUT_S)
