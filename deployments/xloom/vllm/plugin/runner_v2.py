"""Scaling sequences in vLLM's V2 model runner: what GPUs use. It keeps a request's state while it skips steps.

Relies on vLLM 0.32, `vllm.v1.worker.gpu.model_runner.GPUModelRunner`: the methods wrapped here,
`req_states.{req_id_to_index,last_sampled_tokens}`, `lora_state.lora_ids` and `execute_model_state.hidden_states`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from xloom.vllm.plugin.gate_reports import with_gates
from xloom.vllm.plugin.pairs import is_scaling, scaling_id
from xloom.vllm.plugin.step import MixtureStep, Row, kept_on, rows_in_order


class _Mixtures:
    """What one runner keeps for mixtures."""

    def __init__(self, runner: Any) -> None:
        self.step = MixtureStep(runner.lora_manager, runner.device)
        self.batch: Any = None  # of the step under way (vLLM's InputBatch)
        self.rows: list[Row] = []


def _mixtures_of(runner: Any) -> _Mixtures | None:
    return kept_on(runner, _Mixtures)


def patch() -> type:
    """Wrap the runner's methods in this process. The runner's class."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    runner.execute_model = _executing(runner.execute_model)
    runner.prepare_inputs = _preparing(runner.prepare_inputs)
    runner._set_active_loras = _activating(runner._set_active_loras)
    runner.sample = _sampling(runner.sample)
    runner.sample_tokens = _telling(runner.sample_tokens)
    runner.postprocess_sampled = _postprocessing(runner.postprocess_sampled)
    return GPUModelRunner  # type: ignore[no-any-return]


def _executing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @torch.inference_mode()
    def execute_model(self: Any, output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        mixtures = _mixtures_of(self)
        if mixtures is None:
            return original(self, output, *args, **kwargs)
        mixtures.batch, mixtures.rows = None, []
        mixtures.step.begin(output)
        result = original(self, output, *args, **kwargs)
        if mixtures.rows:
            mixtures.step.make(mixtures.rows, self.execute_model_state.hidden_states)
        return result

    return execute_model


def _preparing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        mixtures = _mixtures_of(self)
        if mixtures is not None and not mixtures.step.idle:
            mixtures.batch = batch
            loras = self.lora_state.lora_ids
            mixtures.rows = rows_in_order(
                (name, int(loras[index]), int(count), int(position))
                for name, index, count, position in zip(
                    batch.req_ids,
                    batch.idx_mapping_np,
                    batch.num_scheduled_tokens,
                    batch.num_computed_tokens_np,
                    strict=True,
                )
            )
        return batch

    return prepare_inputs


def _activating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _set_active_loras(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        mixtures = _mixtures_of(self)
        if mixtures is not None and mixtures.rows:
            mixtures.step.hand_over(mixtures.rows)

    return _set_active_loras


def _sampling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample(self: Any, hidden_states: torch.Tensor, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of scaling sequences alone samples nothing, as chunks of prompts do not."""
        if not all(map(is_scaling, batch.req_ids)):
            return original(self, hidden_states, batch, *args, **kwargs)
        count, device = len(batch.req_ids), hidden_states.device
        none = torch.zeros(count, dtype=torch.int32, device=device)
        tokens = torch.zeros(count, 1, dtype=torch.int64, device=device)
        return SamplerOutput(tokens, None, None, none, none), none, none

    return sample


def _telling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        mixtures = _mixtures_of(self)
        gates = None if mixtures is None else mixtures.step.told()
        return with_gates(original(self, *args, **kwargs), gates)

    return sample_tokens


def _postprocessing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def postprocess_sampled(self: Any, *args: Any, **kwargs: Any) -> None:
        """What a request sampled is its scaling sequence's next token. At once: the request may lose its place."""
        original(self, *args, **kwargs)
        mixtures = _mixtures_of(self)
        if mixtures is None or mixtures.batch is None:
            return
        places = self.req_states.req_id_to_index
        names = [name for name in mixtures.batch.req_ids if not is_scaling(name) and scaling_id(name) in places]
        if names:
            last = self.req_states.last_sampled_tokens
            pairs = [[places[name] for name in names], [places[scaling_id(name)] for name in names]]
            sampled, scaling = async_tensor_h2d(pairs, device=last.device, dtype=torch.int64)
            last[scaling] = last[sampled]

    return postprocess_sampled
