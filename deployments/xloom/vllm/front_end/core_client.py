"""vLLM's engine-core client, with replicas behind it instead of a local engine process.

Relies on vLLM 0.32: `vllm.v1.engine.core_client.EngineCoreClient` (what `AsyncLLM` calls on it: `AsyncMPClient`
is the model), `vllm.v1.engine.{EngineCoreRequest, EngineCoreOutput, EngineCoreOutputs}`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from vllm.lora.request import LoRARequest
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    FINISH_REASON_STRINGS,
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from xloom.observability.logs import bound
from xloom.protocol import Logprobs, TokenChunk, TokenRequest, XloomError
from xloom.router.dispatch import Dispatcher
from xloom.router.return_mixture import wanted_gates
from xloom.router.traffic import Ending
from xloom.router.weights import sent_weights
from xloom.vllm.front_end.large_answers import aside
from xloom.vllm.front_end.mixture_record import MixtureRecord
from xloom.vllm.lora import adapter_ref
from xloom.vllm.sampling import sampling_to_dict

logger = logging.getLogger(__name__)

_FINISH = {name: FinishReason(number) for number, name in enumerate(FINISH_REASON_STRINGS)}


@dataclass
class _Resources:
    """The part of vLLM's `BackgroundResources` that `AsyncLLM.errored` reads."""

    engine_dead: bool = False


@dataclass
class _Prefill:
    """What the first chunk of a request is told with."""

    prompt_tokens: int
    submitted: float  # monotonic


class RoutedCoreClient(EngineCoreClient):
    """Speaks `EngineCoreRequest` and `EngineCoreOutputs` to `AsyncLLM`, and frames to replicas."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.resources = _Resources()
        self.engine_ranks_managed = [0]
        self._dispatcher = dispatcher
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._prefills: dict[str, _Prefill] = {}
        self._records: dict[str, MixtureRecord] = {}  # of mixtures' requests
        self._prefix_cache = PrefixCacheStats()  # of the prompts computed since the last figures
        self._waiting: dict[str, list[EngineCoreOutput]] = {}  # until their prompts' log-probabilities are read
        self._reading: set[asyncio.Task[None]] = set()
        self._on_failed: Callable[[str, XloomError], None] = lambda request_id, error: None
        self._on_prompt: Callable[[str, LogprobsTensors], None] = lambda request_id, logprobs: None
        dispatcher.on_tokens = self._take_step
        dispatcher.on_failed = self._take_failure
        dispatcher.on_figures = self._take_figures

    def call_on_failure(self, on_failed: Callable[[str, XloomError], None]) -> None:
        """Who ends a request that no replica can serve."""
        self._on_failed = on_failed

    def call_on_prompt_logprobs(self, on_prompt: Callable[[str, LogprobsTensors], None]) -> None:
        """Who takes a prompt's log-probabilities, in a thread, before the first output of its request."""
        self._on_prompt = on_prompt

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if request.abort_immediately:
            return
        try:
            self._submit(request)
        except XloomError as error:
            self._take_failure(request.request_id, error)
        except Exception as error:  # AsyncLLM has registered it, and would wait for its tokens for ever
            logger.exception("request %s could not be sent", request.request_id)
            message = f"The request can't be sent to a replica: {error}"
            self._take_failure(request.request_id, XloomError("unencodable_request", message, "Mend the request."))

    def _submit(self, request: EngineCoreRequest) -> None:
        if request.sampling_params is None or request.prompt_token_ids is None or request.mm_features:
            message = "Only text generation crosses to the replicas."
            raise XloomError("input_not_supported", message, "Send text.", 400)
        if request.sampling_params.prompt_logprob_token_ids is not None:
            message = "prompt_logprob_token_ids has no answer here."
            raise XloomError("unsupported_sampling", message, "Ask for prompt_logprobs.", 400)
        adapter = adapter_ref(request.lora_request) if request.lora_request else None
        wanted = wanted_gates() if adapter is not None and adapter.is_mixture else None
        told = TokenRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=sampling_to_dict(request.sampling_params),
            adapter=adapter,
            priority=request.priority,
            arrival_time=request.arrival_time,
            cache_salt=request.cache_salt,
            client_id=bound().get("request_id", ""),
            weights=sent_weights(),
            layer_gates=wanted is not None and wanted.detail == "layers",
            extra={} if request.reasoning_ended is None else {"reasoning_ended": request.reasoning_ended},
        )
        self._prefills[request.request_id] = _Prefill(len(request.prompt_token_ids), time.monotonic())
        if adapter is not None and adapter.is_mixture:
            detail = None if wanted is None else wanted.detail
            record = MixtureRecord(adapter.kind, len(request.prompt_token_ids), detail)
            self._records[request.request_id] = record
        self._dispatcher.submit(told)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        # Only AsyncLLM's output handler comes here, with what has met a stop string: see RoutedEngineClient.abort.
        self.abort_now(request_ids, "stop")

    def abort_now(self, request_ids: list[str], ending: Ending) -> None:
        """Forget requests and free what they hold."""
        for request_id in request_ids:
            self._forget(request_id)
        self._dispatcher.abort(request_ids, ending)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        return True  # the store's desired state brings adapters to the replicas

    async def remove_lora_async(self, lora_id: int) -> bool:
        return True

    async def list_loras_async(self) -> set[int]:
        return set()

    async def reset_mm_cache_async(self) -> None:
        return None

    async def is_sleeping_async(self) -> bool:
        return False

    def dp_engines_running(self) -> bool:
        return self._dispatcher.in_flight > 0

    def shutdown(self, timeout: float | None = None) -> None:
        self.resources.engine_dead = True

    def set_vocabulary(self, tokens: int) -> None:
        """How many log-probabilities `-1` stands for."""
        self._dispatcher.vocabulary = tokens

    # From the replicas.

    def _take_step(self, chunks: list[TokenChunk]) -> None:
        """One frame becomes one `EngineCoreOutputs`: the hot path."""
        outputs = []
        for chunk in chunks:
            try:
                output = self._output(chunk)
                if (waiting := self._waiting.get(chunk.request_id)) is not None:
                    waiting.append(output)
                elif chunk.prompt_logprobs is not None:
                    self._waiting[chunk.request_id] = [output]
                    self._read_prompt(chunk.request_id, chunk.prompt_logprobs)
                else:
                    outputs.append(output)
            except Exception as error:
                self._give_up(chunk.request_id, error)
        if outputs:
            self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs))

    def _output(self, chunk: TokenChunk) -> EngineCoreOutput:
        output = EngineCoreOutput(chunk.request_id, chunk.token_ids)
        prefill = self._prefills.pop(chunk.request_id, None)
        if prefill is not None:
            self._prefix_cache.record(prefill.prompt_tokens, chunk.num_cached_tokens, preempted=False)
            _mark_first(output, prefill, chunk)
        if chunk.preemptions:
            preempted = EngineCoreEvent(EngineCoreEventType.PREEMPTED, time.monotonic())
            output.events = [*(output.events or ()), *[preempted] * chunk.preemptions]
        if chunk.gates is not None and (record := self._records.get(chunk.request_id)) is not None:
            output.spec_decode_metrics = record.add(chunk.gates)  # see `MixedResults`
        if chunk.finish_reason is not None:
            self._records.pop(chunk.request_id, None)
            output.finish_reason = _FINISH[chunk.finish_reason]
            output.stop_reason = chunk.stop_reason
        if chunk.logprobs is not None:
            output.new_logprobs = _logprobs_lists(chunk.logprobs)
        return output

    def _read_prompt(self, request_id: str, logprobs: Logprobs) -> None:
        """A prompt's log-probabilities are text by text in a thread; what else comes of the request waits for it."""

        async def read() -> None:
            try:
                await aside(lambda: self._on_prompt(request_id, _logprobs_tensors(logprobs)))
            except Exception as error:
                self._give_up(request_id, error)
            if self._waiting.get(request_id) is outputs:
                del self._waiting[request_id]
                self._outputs.put_nowait(EngineCoreOutputs(outputs=outputs))

        outputs = self._waiting[request_id]
        task = asyncio.create_task(read())
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    def _give_up(self, request_id: str, error: Exception) -> None:
        """End a request whose answer can't be read; called where that was found."""
        logger.exception("the answer to request %s can't be read", request_id)
        message = f"The engine's answer can't be read: {type(error).__name__}."
        self._dispatcher.give_up(request_id, XloomError("answer_unsendable", message, "Report it.", 500))

    def _forget(self, request_id: str) -> None:
        self._prefills.pop(request_id, None)
        self._records.pop(request_id, None)
        self._waiting.pop(request_id, None)

    def _take_failure(self, request_id: str, error: XloomError) -> None:
        self._forget(request_id)
        self._on_failed(request_id, error)

    def _take_figures(self) -> None:
        """Reports become the scheduler figures of vLLM's own metrics, summed over replicas."""
        stats = [link.stats for link in self._dispatcher.directory.links]
        pages = sum(each.kv_pages_total for each in stats)
        figures = SchedulerStats(
            num_running_reqs=sum(each.running for each in stats),
            num_waiting_reqs=sum(each.waiting for each in stats),
            kv_cache_usage=sum(each.kv_pages_used for each in stats) / pages if pages else 0.0,
            prefix_cache_stats=self._prefix_cache,
        )
        self._prefix_cache = PrefixCacheStats()
        self._outputs.put_nowait(EngineCoreOutputs(scheduler_stats=figures))


def _mark_first(output: EngineCoreOutput, prefill: _Prefill, chunk: TokenChunk) -> None:
    """Figures vLLM takes from the first output of a request, on this process's clock; the way there is prefill."""
    prompt, cached = prefill.prompt_tokens, chunk.num_cached_tokens
    output.prefill_stats = PrefillStats(prompt, prompt - cached, cached, cached)
    output.events = [
        EngineCoreEvent(EngineCoreEventType.QUEUED, prefill.submitted),
        EngineCoreEvent(EngineCoreEventType.SCHEDULED, prefill.submitted + chunk.queued_us / 1e6),
    ]


def _logprobs_lists(logprobs: Logprobs) -> LogprobsLists:
    return LogprobsLists(
        np.asarray(logprobs.token_ids, dtype=np.int32),
        np.asarray(logprobs.logprobs, dtype=np.float32),
        np.asarray(logprobs.ranks, dtype=np.int32),
    )


def _logprobs_tensors(logprobs: Logprobs) -> LogprobsTensors:
    """`[num_tokens, num_candidates]`; a prompt of one token has none."""
    shape = len(logprobs.token_ids), len(logprobs.token_ids[0]) if logprobs.token_ids else 0
    return LogprobsTensors(
        torch.tensor(logprobs.token_ids, dtype=torch.int32).view(shape),
        torch.tensor(logprobs.logprobs, dtype=torch.float32).view(shape),
        torch.tensor(logprobs.ranks, dtype=torch.int32),
    )
