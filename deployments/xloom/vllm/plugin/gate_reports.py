"""What the gates of a step's rows were, on their way from a model runner to the scheduler, with the tokens sampled.

Of each row that a token is sampled from: the mean over its linears, and for a request that asks for them the means over
each layer's. Of a prompt: the sum over its rows, each counted once, however often it is computed. On a GPU nothing
waits: copies arrive with the step's tokens.

Relies on vLLM 0.32: `AsyncModelRunnerOutput.get_output` is called once, where waiting is in order; the attributes of
what it gives, a `ModelRunnerOutput`, reach the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.outputs import AsyncModelRunnerOutput

from xloom.vllm.plugin import GATES
from xloom.vllm.plugin.gates import SlotRouting
from xloom.vllm.plugin.pairs import LAYERS_ARG, adapters_of, is_scaling


class Told(NamedTuple):
    """The gates of one request in one step; K adapters."""

    token: np.ndarray[Any, Any] | None  # [K] float32, of its last row, if a token may be sampled from that
    layers: np.ndarray[Any, Any] | None  # [num_layers, K] float32, of the same row; NaN for a layer without linears
    prompt: np.ndarray[Any, Any] | None = None  # [K] float64, the sum over rows of the prompt not told before
    prompt_tokens: int = 0  # how many


@dataclass
class _Told:
    """What is kept of a request."""

    prompt_tokens: int
    layers: bool  # whether it asks for each layer's
    end: int = 0  # of the rows of its prompt that were told


class _Piece(NamedTuple):
    """A request's rows among those of one mixture."""

    request_id: str
    prompt: slice | None  # those to be summed
    last: int | None  # the one that a token may be sampled from
    layers: int | None  # where that one's layers are


@dataclass
class _Part:
    """The rows of one mixture in a step: their means `[num_rows, K]`, or `[1, K]` of all; on the host once arrived."""

    pieces: list[_Piece]
    means: Tensor
    layers: Tensor | None  # [num_asked, num_layers, K]


@dataclass
class StepGates:
    """A step's gates, on their way to the host."""

    parts: list[_Part] = field(default_factory=list)
    arrived: Any = None  # a CUDA event

    def read(self) -> dict[str, Told]:
        """By request; waits until all are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found = {}
        for part in self.parts:
            means = part.means.numpy()
            layers = None if part.layers is None else part.layers.numpy()
            alike = len(means) == 1
            for piece in part.pieces:
                token = None if piece.last is None else means[0 if alike else piece.last]
                each = None if layers is None or piece.layers is None else layers[piece.layers]
                if piece.prompt is None:
                    found[piece.request_id] = Told(token, each)
                    continue
                count = piece.prompt.stop - piece.prompt.start
                rows = means if alike else means[piece.prompt]
                total = rows.sum(0, dtype=np.float64) * (count if alike else 1)
                found[piece.request_id] = Told(token, each, total, count)
        return found


class GateReports:
    """What one model runner tells of its gates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._requests: dict[str, _Told] = {}
        self._step = StepGates()

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, new: NewRequestData) -> None:
        """A request came; one that was preempted comes again, and goes on."""
        if new.lora_request is not None and adapters_of(new.lora_request.lora_path) and not is_scaling(new.req_id):
            layers = bool((new.sampling_params.extra_args or {}).get(LAYERS_ARG))
            self._requests.setdefault(new.req_id, _Told(len(new.prompt_token_ids or ()), layers))

    def drop(self, request_id: str) -> None:
        """It ended."""
        self._requests.pop(request_id, None)

    def clear(self) -> None:
        """A step begins."""
        self._step = StepGates()

    def add(self, routing: SlotRouting, spans: Sequence[tuple[str, int, int]], gates: Tensor) -> None:
        """The gates `[num_rows, M, K]` of all rows of one mixture: `(request, position, count)` in their order."""
        pieces, first, asked = [], 0, list[int]()
        for request_id, position, count in spans:
            if (told := self._requests.get(request_id)) is not None:
                # The last token of a prompt makes the answer's first.
                start, end = max(position, told.end), min(position + count, told.prompt_tokens - 1)
                prompt = last = place = None
                if end > start:
                    prompt, told.end = slice(first + start - position, first + end - position), end
                if position + count >= told.prompt_tokens:
                    last = first + count - 1
                    if told.layers:
                        place = len(asked)
                        asked.append(last)
                if last is not None or prompt is not None:
                    pieces.append(_Piece(request_id, prompt, last, place))
            first += count
        if pieces:
            alike = gates.stride(0) == 0 or len(gates) == 1
            gates = gates[:1] if alike else gates
            means = gates[:, 0] if gates.stride(1) == 0 else gates.mean(1)
            layers = None
            if asked:
                rows = gates
                if not alike:
                    index = async_tensor_h2d(np.array(asked, dtype=np.int64), device=gates.device)
                    rows = gates.index_select(0, index)
                layers = (routing.layer_means(gates.device) @ rows).expand(len(asked), -1, -1)
                layers = self._to_host(layers)
            self._step.parts.append(_Part(pieces, self._to_host(means), layers))

    def take(self) -> StepGates | None:
        """All of this step; None for nothing."""
        step, self._step = self._step, StepGates()
        if not step.parts:
            return None
        if self._device.type == "cuda":
            step.arrived = torch.cuda.Event()
            step.arrived.record()
        return step

    def _to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class _WithGates(AsyncModelRunnerOutput):
    """An output that is on its way, and the gates of its step."""

    def __init__(self, output: AsyncModelRunnerOutput, gates: StepGates) -> None:
        self._output, self._gates = output, gates

    def get_output(self) -> Any:
        return with_gates(self._output.get_output(), self._gates)


def with_gates(output: Any, gates: StepGates | None) -> Any:
    """What a model runner gives for a step, with its gates."""
    if gates is None or output is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _WithGates(output, gates)
    setattr(output, GATES, gates.read())
    return output
