"""LoRA on CPU, gated: rows grouped by slot, plain products, in an operator that torch.compile does not look into."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping

# Relied on: PunicaWrapperCPU.add_lora_linear is the one call of every LoRA linear, and update_metadata comes
# before each batch whose mapping changed; vllm.lora.punica_wrapper, vLLM 0.32.
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op

from xloom.vllm.plugin.gates import BATCH, SlotRouting, SlotRows, rows_of, slices_of
from xloom.vllm.plugin.slot_weights import SlotLinear, slot_linear


def lora_linear(y: torch.Tensor, x: torch.Tensor, lora_a: list[torch.Tensor], lora_b: list[torch.Tensor]) -> None:
    """Add each row's gated LoRA of one linear to `y [num_tokens, out]`, in place.

    `x [num_tokens, in]`; `lora_a`, `lora_b`: one a slice, `[slots, 1, rank, in]` and `[slots, 1, out_slice, rank]`.
    """
    if not BATCH.rows:
        return
    address = lora_a[0].data_ptr()
    for entry in BATCH.rows:
        key = address, entry.slot
        if key not in entry.weights:
            names = BATCH.linears[address]
            entry.weights[key] = slot_linear(lora_a, lora_b, entry.slot, names, entry.ranks, entry.routing)
        weights = entry.weights[key]
        if weights is None:
            continue
        if (row := entry.single_row) is not None:
            weights.single.add_product(y[row], x[row], entry.single_gate_of(address), entry.made)
        else:
            _add(y, x, weights, entry, entry.gate_of(address))


def _add(y: torch.Tensor, x: torch.Tensor, weights: SlotLinear, entry: SlotRows, gate: torch.Tensor | None) -> None:
    places = entry.rows
    if isinstance(places, slice):
        rows, target = x[places], y[places]
    else:  # a third of the time of x[places]
        rows, target = x.index_select(0, places), y.index_select(0, places)
    shrunk, own = weights.shrink(rows, entry.made)
    gate = gate if own is None else own
    if gate is not None:
        if gate.shape[1] != shrunk.shape[1] or len(gate) not in (1, len(shrunk)):
            raise RuntimeError(f"gates {tuple(gate.shape)} for ranks {tuple(shrunk.shape)}")
        shrunk = (shrunk * gate).to(rows.dtype)
    for part in weights.slices:
        part.b.add_product(target[:, part.outputs], shrunk[:, part.ranks])
    if not isinstance(places, slice):
        y.index_copy_(0, places, target)


def _no_fake(y: torch.Tensor, x: torch.Tensor, lora_a: list[torch.Tensor], lora_b: list[torch.Tensor]) -> None:
    return None


direct_register_custom_op(
    op_name="xloom_lora_linear", op_func=lora_linear, mutates_args=["y"], fake_impl=_no_fake, dispatch_key="CPU"
)


class GatedPunicaCPU(PunicaWrapperCPU):
    """vLLM's CPU punica wrapper with the gate, and without its weight copy per token."""

    manager: Any = None
    makes_gates = True  # of a linear's input: R lies under A

    def attach(self, manager: Any) -> None:
        """Take the LoRA manager whose slots this wrapper serves."""
        self.manager = manager
        BATCH.linears, BATCH.gater = slices_of(manager), self

    def reserve(self, routing: SlotRouting) -> None:
        """Gates come as tensors of their own here."""

    def set_gates(self, entry: SlotRows, gates: torch.Tensor) -> None:
        entry.set_gates(gates)

    def made_gates(self, entry: SlotRows) -> torch.Tensor:
        made = torch.cat([gates for _, gates in entry.made], 1)
        order = [module for modules, _ in entry.made for module in modules]
        return made if order == sorted(order) else made[:, np.argsort(order)]

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        # The base class's index tensors serve its bgmv/sgmv kernels alone, which are not used here.
        BATCH.rows = rows_of(np.asarray(mapping.index_mapping), self.manager)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        torch.ops.vllm.xloom_lora_linear(y, x, list(lora_a_stacked), list(lora_b_stacked))
