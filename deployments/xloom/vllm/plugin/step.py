"""What a model runner does for mixtures in a step: hands the gates of its rows to the kernels, and makes new ones.

Both of vLLM's runners call this: `runner_v1.py` and `runner_v2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

# Relied on: get_tp_group().{world_size,broadcast}; WorkerLoRAManager.{add_adapter,_adapter_manager}; vLLM 0.32.
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora.request import LoRARequest
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput

from xloom.mixtures.routing.base import Routing
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.mixtures.single_pass import segment_end
from xloom.vllm.plugin.gate_reports import GateReports, StepGates
from xloom.vllm.plugin.gate_store import GateStore, Span
from xloom.vllm.plugin.gates import BATCH, SlotRouting, SlotRows
from xloom.vllm.plugin.pairs import (
    BUNDLE_ARG,
    WEIGHTS_ARG,
    client_tokens,
    constants_of,
    is_scaling,
    mixture_id,
    source_of,
)
from xloom.vllm.plugin.rank_tally import tally_of_this_rank

Kept = TypeVar("Kept")


class Row(NamedTuple):
    """A request's tokens in a batch."""

    request_id: str
    lora_id: int  # 0 for the base model
    first: int  # of the batch's token axis
    num_tokens: int
    position: int  # of the first token in its sequence


class SinglePass(NamedTuple):
    """A request of a bundle whose gates come from the mixture's own hidden states, once its prompt is over."""

    bundle: LoRARequest
    num_client_tokens: int
    prefill: str


class _Making(NamedTuple):
    """Hidden states of a batch, and the tokens whose gates are made of them."""

    bundle: LoRARequest
    request_id: str  # the mixture's
    position: int
    num_tokens: int
    first: int  # of the batch's token axis
    num_rows: int  # as many as tokens, or 1 for all


class MixtureStep:
    """The mixtures' side of one model runner."""

    def __init__(self, lora_manager: Any, device: torch.device) -> None:
        self.store = GateStore()
        self._lora_manager, self._device = lora_manager, device
        self._bundles: dict[str, LoRARequest] = {}  # by scaling sequence
        self._single: dict[str, SinglePass] = {}  # by request
        self._weights: dict[str, list[float] | None] = {}  # by request with constant gates; None: the mixture's own
        self._constants: dict[str, Tensor] = {}  # [M, K], made of them
        self._tally = tally_of_this_rank(device.type)
        self.reports = GateReports(device) if self._tally is not None else None  # of the rank whose outputs count
        self._made: list[tuple[SlotRows, list[Row]]] = []  # rows of this step whose gates the forward pass makes
        self._timed = False

    def begin(self, output: SchedulerOutput) -> None:
        """Learn of requests that came, went or start again with this step."""
        if self.reports is not None:
            self.reports.clear()
            for name in output.finished_req_ids:
                self.reports.drop(name)
            for new in output.scheduled_new_reqs:
                self.reports.begin(new)
        for name in output.finished_req_ids:
            self._bundles.pop(name, None)
            self._single.pop(name, None)
            self._weights.pop(name, None)
            self._constants.pop(name, None)
            self.store.drop(name)
        if output.preempted_req_ids and not self.idle:
            again = output.scheduled_cached_reqs.resumed_req_ids | {new.req_id for new in output.scheduled_new_reqs}
            for name in output.preempted_req_ids:
                owner = mixture_id(name)
                # A scaling sequence preempted in the step in which its request still uses what is there: the next
                # step preempts that one, too.
                if owner not in output.num_scheduled_tokens or owner in again:
                    self.store.drop(owner)
        for new in output.scheduled_new_reqs:
            if is_scaling(new.req_id):
                self._bundles[new.req_id] = new.sampling_params.extra_args[BUNDLE_ARG]
            elif (source := source_of(new.lora_request)) is not None and source.routing_passes == 1:
                sent = client_tokens(len(new.prompt_token_ids or ()), new.sampling_params)
                self._single[new.req_id] = SinglePass(new.lora_request, sent, source.prefill)
            elif new.lora_request is not None and constants_of(new.lora_request.lora_path) is not None:
                self._weights[new.req_id] = (new.sampling_params.extra_args or {}).get(WEIGHTS_ARG)

    @property
    def idle(self) -> bool:
        """Whether there is no request whose gates have to be handed over or told."""
        return not self._bundles and not self._single and not self._weights and not self.reports

    def in_two_passes(self, request_id: str) -> bool:
        """Whether a mixture's request and its scaling sequence have the same tokens to the end."""
        return request_id not in self._single

    def hand_over(self, rows: Sequence[Row]) -> None:
        """Before the forward pass: the gates of the batch's rows, to the kernels."""
        entries = BATCH.gated()
        scaling = sum(row.num_tokens for row in rows if is_scaling(row.request_id))
        routed = any(isinstance(entry.routing.routing, XLoraRouting) for entry in entries if entry.routing)
        self._timed = self._tally is not None and bool(routed or scaling)
        if self._timed and self._tally is not None:
            self._tally.start(scaling_share=scaling / sum(row.num_tokens for row in rows))
        made = BATCH.made()
        held: dict[int, list[Row]] = {entry.adapter_id: [] for entry in (*entries, *made)}
        if held:
            for row in rows:
                if row.lora_id in held:
                    held[row.lora_id].append(row)
        for entry in entries:
            spans = [self._span(row, entry.routing) for row in held[entry.adapter_id]]
            gates = self.store.take(spans)
            assert BATCH.gater is not None
            BATCH.gater.set_gates(entry, gates)
            self._count(entry.routing, spans, gates)
            self._tell(entry, held[entry.adapter_id], gates)
        self._made = [(entry, held[entry.adapter_id]) for entry in made]
        for entry in made:
            entry.made.clear()
        self._lap()

    def _tell(self, entry: SlotRows, rows: Sequence[Row], gates: Tensor) -> None:
        if self.reports is not None and entry.routing is not None:
            self.reports.add(entry.routing, [(row.request_id, row.position, row.num_tokens) for row in rows], gates)

    def told(self) -> StepGates | None:
        """What this step's gates were, for the scheduler; None for nothing. Once."""
        return None if self.reports is None else self.reports.take()

    def _count(self, routing: SlotRouting | None, spans: Sequence[Span], gates: Tensor) -> None:
        """Add the gates of the requests' own tokens, each as often as it is computed, to the figures."""
        if self._tally is None or routing is None:
            return
        own = [not is_scaling(span.request_id) for span in spans]
        if not all(own):  # scaling sequences that run the bundle at constant gates
            index = np.flatnonzero(np.repeat(own, [span.num_tokens for span in spans]))
            gates = gates.index_select(0, async_tensor_h2d(index, device=gates.device))
        if len(gates):
            self._tally.add(routing.name, routing.routing, gates)

    def _span(self, row: Row, routing: SlotRouting | None) -> Span:
        if row.request_id in self._weights:
            return Span(row.request_id, row.position, row.num_tokens, self._constant(row.request_id, routing))
        single = self._single.get(row.request_id)
        if is_scaling(row.request_id) or (single is not None and single.prefill == "lagged" and row.position == 0):
            assert routing is not None
            return Span(row.request_id, row.position, row.num_tokens, routing.constant)
        return Span(row.request_id, row.position, row.num_tokens)

    def _constant(self, request_id: str, routing: SlotRouting | None) -> Tensor:
        """The gates `[M, K]` of a request with constant ones, on the device."""
        found = self._constants.get(request_id)
        if found is None:
            assert routing is not None
            assert isinstance(routing.routing, FixedRouting)
            gates = routing.routing.gates(self._weights[request_id])
            found = self._constants[request_id] = _on_device(gates, self._device)
        return found

    def make(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """After the forward pass: gates of tokens to come, from `hidden [num_tokens or more, hidden]`."""
        for entry, of_entry in self._made:
            assert BATCH.gater is not None
            self._tell(entry, of_entry, BATCH.gater.made_gates(entry))
            entry.made.clear()
        self._made = []
        self._lap()
        by_bundle: dict[int, list[_Making]] = {}
        for row in rows:
            making = self._making(row)
            if making is not None:
                by_bundle.setdefault(making.bundle.lora_int_id, []).append(making)
        for makings in by_bundle.values():
            routing = self._routing(makings[0].bundle)
            gates = self._gates(routing.routing, _picked(hidden, makings))
            first = 0
            for each in makings:
                alike = each.num_rows < each.num_tokens
                source, start = (gates[first : first + 1], 0) if alike else (gates, first)
                self.store.put(each.request_id, each.position, source, start, each.num_tokens)
                first += each.num_rows
        for entry in BATCH.gated():
            entry.gates = None  # used once: a step that forgot to set them must fail, not be wrong
        self._lap()

    def _making(self, row: Row) -> _Making | None:
        """What hidden states are for: a scaling sequence's for the same tokens, a request's last for the next."""
        if is_scaling(row.request_id):
            owner, count = mixture_id(row.request_id), row.num_tokens
            return _Making(self._bundles[row.request_id], owner, row.position, count, row.first, count)
        single, end = self._single.get(row.request_id), row.position + row.num_tokens
        if single is None or (single.prefill == "exact" and end < single.num_client_tokens):
            return None
        if segment_end(end - 1, single.num_client_tokens, single.prefill) > end:
            return None  # amid a segment
        count = segment_end(end, single.num_client_tokens, single.prefill) - end
        return _Making(single.bundle, row.request_id, end, count, row.first + row.num_tokens - 1, 1)

    def _gates(self, routing: Routing, hidden: Tensor) -> Tensor:
        """`[num_rows, M, K]`, made by the first rank for all: near a top-k's edge ranks may differ in the last bit."""
        assert isinstance(routing, XLoraRouting)
        gates = routing.gates(hidden)
        group = get_tp_group()
        if group.world_size == 1:
            return gates
        alike = gates.stride(1) == 0  # the same at every module: a broadcast view
        sent = (gates[:, :1] if alike else gates).contiguous()
        same: Tensor = group.broadcast(sent, src=0)
        return same.expand(gates.shape)

    def _routing(self, bundle: LoRARequest) -> SlotRouting:
        """The bundle's router. The scaling sequence runs first, so maybe before vLLM has loaded the bundle."""
        manager = self._lora_manager._adapter_manager
        if bundle.lora_int_id not in manager._registered_adapters.cache:
            self._lora_manager.add_adapter(bundle)
        routing: SlotRouting = manager._registered_adapters.cache[bundle.lora_int_id].xloom_routing
        return routing

    def _lap(self) -> None:
        if self._timed and self._tally is not None:
            self._tally.lap()


def _on_device(gates: Tensor, device: torch.device) -> Tensor:
    """Gates `[M, K]` that are the same at every module, without the host waiting for their copy."""
    row: Tensor = async_tensor_h2d(gates[0].numpy(), device=device)
    return row.expand(gates.shape)


def _picked(hidden: Tensor, makings: Sequence[_Making]) -> Tensor:
    """The hidden states `[num_rows, hidden]` that gates are made of."""
    first, last = makings[0].first, makings[-1].first + makings[-1].num_rows
    if last - first == sum(each.num_rows for each in makings):
        return hidden[first:last]
    index = np.concatenate([np.arange(each.first, each.first + each.num_rows) for each in makings])
    return hidden.index_select(0, async_tensor_h2d(index, device=hidden.device))


def kept_on(runner: Any, kind: Callable[[Any], Kept]) -> Kept | None:
    """What a model runner keeps for mixtures, made when first asked for; None of one without LoRA."""
    found: Kept | None = getattr(runner, "_xloom_mixtures", None)
    if found is None and hasattr(runner, "lora_manager"):
        found = runner._xloom_mixtures = kind(runner)
    return found


def rows_in_order(requests: Iterable[tuple[str, int, int, int]]) -> list[Row]:
    """Rows of a batch from `(request_id, lora_id, count, position)` in the batch's order."""
    rows, first = [], 0
    for request_id, lora_id, count, position in requests:
        rows.append(Row(request_id, lora_id, first, count, position))
        first += count
    return rows
