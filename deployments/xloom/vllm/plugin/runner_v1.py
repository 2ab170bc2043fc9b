"""Scaling sequences in vLLM's V1 model runner: what CPUs use, and GPUs with VLLM_USE_V2_MODEL_RUNNER=0.

V1 takes a request that is not scheduled out of its batch and puts it back later, which would be two changes a token
for each pair. A pair has the same tokens, so the two hand one row to each other instead.

Relies on vLLM 0.32, `vllm.v1.worker.gpu_model_runner.GPUModelRunner`: the four methods wrapped here, `requests`,
`input_batch` (`vllm.v1.worker.gpu_input_batch.InputBatch`) and `discard_request_mask`, which drops what is sampled
for a request with more tokens than are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from xloom.vllm.plugin.gate_reports import with_gates
from xloom.vllm.plugin.pairs import is_scaling, mixture_id
from xloom.vllm.plugin.step import MixtureStep, Row, kept_on, rows_in_order


class _ScalingState(CachedRequestState):
    """Always a token more than computed: the runner drops what it samples, as of a chunk of a prompt."""

    @property
    def num_tokens(self) -> int:
        return int(self.num_prompt_tokens) + len(self.output_token_ids) + 1


class PairRows:
    """Rows of the batch that scaling sequences have from their requests, and what must be put back with them."""

    def __init__(self, runner: Any, step: MixtureStep) -> None:
        self._runner, self._step = runner, step
        self._lent: dict[str, torch.Generator | None] = {}  # scaling sequence -> its request's random generator

    def before(self, output: SchedulerOutput) -> None:
        """Hand rows over ahead of the runner's own update."""
        batch, cached = self._runner.input_batch, output.scheduled_cached_reqs
        staying = set(cached.req_ids) - cached.resumed_req_ids - output.finished_req_ids
        for scaling in list(self._lent):
            request = mixture_id(scaling)
            if scaling not in staying or request in output.num_scheduled_tokens:
                self._give_back(scaling, cached.all_token_ids.get(request) if request in staying else None)
        for scaling in cached.req_ids:
            request = mixture_id(scaling)
            if scaling == request or scaling not in staying or scaling in batch.req_id_to_index:
                continue
            idle = request not in output.num_scheduled_tokens and request not in output.finished_req_ids
            if idle and request in batch.req_id_to_index and self._step.in_two_passes(request):
                self._lend(scaling, cached.all_token_ids[scaling])
        for scaling, generated in cached.all_token_ids.items():
            if is_scaling(scaling) and scaling not in self._lent:
                self._runner.requests[scaling].output_token_ids = self._generated(scaling, generated)

    def _generated(self, scaling: str, sent: list[int]) -> list[int]:
        """The tokens that a scaling sequence has beside its prompt's. Synchronously the runner sampled them itself."""
        request = self._runner.requests.get(mixture_id(scaling))
        if self._runner.use_async_scheduling or request is None or not self._step.in_two_passes(request.req_id):
            return list(sent)
        known: list[int] = request.output_token_ids
        return known

    def _lend(self, scaling: str, generated: list[int]) -> None:
        requests, batch = self._runner.requests, self._runner.input_batch
        state = requests[mixture_id(scaling)]
        row = self._rename(mixture_id(scaling), scaling)
        self._lent[scaling] = batch.generators.pop(row, None)
        known = requests[scaling].output_token_ids = state.output_token_ids
        if generated and generated[-1] != -1:  # asynchronously: the token is known, if no step was waiting for it
            if known:
                known[-1] = generated[-1]
            batch.token_ids_cpu[row, state.num_prompt_tokens + len(generated) - 1] = generated[-1]

    def _give_back(self, scaling: str, generated: list[int] | None) -> None:
        """`generated`: the request's tokens beside its prompt's, when it is in this step."""
        batch, request = self._runner.input_batch, mixture_id(scaling)
        row = self._rename(scaling, request)
        generator = self._lent.pop(scaling)
        if generator is not None:
            batch.generators[row] = generator
        if not generated:
            return
        state, count = self._runner.requests[request], len(generated)
        known = state.output_token_ids
        if len(known) >= count and known[count - 1] == -1:
            known[count - 1] = generated[-1]
        batch.token_ids_cpu[row, state.num_prompt_tokens + count - 1] = generated[-1]

    def _rename(self, old: str, new: str) -> int:
        """Give a row to the other half of its pair: its pages and its LoRA change. The row's number."""
        batch, state = self._runner.input_batch, self._runner.requests.get(new)
        row: int = batch.req_id_to_index.pop(old)
        batch.req_id_to_index[new] = row
        batch._req_ids[row] = new
        if state is not None:  # else it has ended, and its row is about to be removed
            batch.block_table.clear_row(row)
            batch.block_table.add_row(state.block_ids, row)
            # The batch goes on counting the request among its LoRA's users, which keeps the slot: the row comes back.
            batch.request_lora_mapping[row] = state.lora_request.lora_int_id if state.lora_request else 0
        return row


class _Mixtures:
    """What one runner keeps for mixtures."""

    def __init__(self, runner: Any) -> None:
        self.step = MixtureStep(runner.lora_manager, runner.device)
        self.pairs = PairRows(runner, self.step)
        self.output: SchedulerOutput | None = None  # of the step under way, when it has pairs


def _mixtures_of(runner: Any) -> _Mixtures | None:
    return kept_on(runner, _Mixtures)


def patch() -> type:
    """Wrap the runner's methods in this process. The runner's class."""
    runner: Any = GPUModelRunner
    runner.execute_model = _executing(runner.execute_model)
    runner._update_states = _updating(runner._update_states)
    runner._model_forward = _forwarding(runner._model_forward)
    runner.sample_tokens = _sampling(runner.sample_tokens)
    return GPUModelRunner  # type: ignore[no-any-return]


class _OnlyScaling(Exception):
    """A step of scaling sequences alone is over with its forward pass: nothing of it is sampled."""


def _executing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except _OnlyScaling:
            names = list(self.input_batch.req_ids)
            return ModelRunnerOutput(names, {name: place for place, name in enumerate(names)})

    return execute_model


def _updating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _update_states(self: Any, output: SchedulerOutput) -> Any:
        mixtures = _mixtures_of(self)
        if mixtures is None:
            return original(self, output)
        was_idle, mixtures.output = mixtures.step.idle, None
        mixtures.step.begin(output)
        if was_idle and mixtures.step.idle:
            return original(self, output)
        batch, cached = self.input_batch, output.scheduled_cached_reqs
        previous = dict(batch.prev_req_id_to_index or {})
        mixtures.pairs.before(output)
        corrections = original(self, output)
        for new in output.scheduled_new_reqs:
            if is_scaling(new.req_id):
                self.requests[new.req_id].__class__ = _ScalingState
        for scaling, generated in cached.all_token_ids.items():
            if is_scaling(scaling) and generated and generated[-1] == -1:  # on the device, where its request sampled it
                batch.prev_req_id_to_index[scaling] = previous[mixture_id(scaling)]
        mixtures.output = output
        return corrections

    return _update_states


def _forwarding(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mixtures = _mixtures_of(self)
        if mixtures is None or mixtures.output is None:
            return original(self, *args, **kwargs)
        rows = _rows(self.input_batch, mixtures.output)
        mixtures.output = None
        mixtures.step.hand_over(rows)
        result = original(self, *args, **kwargs)
        mixtures.step.make(rows, result if isinstance(result, torch.Tensor) else result[0])
        # Asynchronously vLLM asks for what was sampled without looking whether the step has an output already.
        if not self.use_async_scheduling and all(is_scaling(row.request_id) for row in rows):
            raise _OnlyScaling
        return result

    return _model_forward


def _rows(batch: Any, output: SchedulerOutput) -> list[Row]:
    loras, positions = batch.request_lora_mapping, batch.num_computed_tokens_cpu
    return rows_in_order(
        (name, int(loras[row]), output.num_scheduled_tokens[name], int(positions[row]))
        for row, name in enumerate(batch.req_ids)
    )


def _sampling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        mixtures = _mixtures_of(self)
        gates = None if mixtures is None else mixtures.step.told()
        return with_gates(sampled(self, grammar_output), gates)

    def sampled(self: Any, grammar_output: Any) -> Any:
        if self.device.type != "cpu" or self.execute_model_state is None:
            return original(self, grammar_output)
        # A chunk of a prompt samples in vain. `_bookkeeping_sync` then turns a seeded generator back by its offset,
        # which a CPU's has not: it is kept out of the sampling instead.
        generators = self.input_batch.generators
        in_vain = [row for row in generators if self.discard_request_mask.np[row]]
        kept = {row: generators.pop(row) for row in in_vain}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(kept)

    return sample_tokens
