"""LoRA on GPU, gated: vLLM's Triton wrapper with a shrink of ours, which multiplies by the gates.

All that varies from step to step lies in tensors of fixed address, so that captured CUDA graphs see it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping

# Relied on: PunicaWrapperGPU.{add_shrink,update_metadata,token_mapping_meta,prompt_mapping_meta,lora_config,is_prefill}
# and that its update_metadata does what is done here; vLLM 0.32.
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import direct_register_custom_op

from xloom.vllm.plugin.gate_tables import GateTables
from xloom.vllm.plugin.gated_shrink import gated_shrink
from xloom.vllm.plugin.gates import BATCH, SlotRouting, SlotRows, rows_of, slices_of
from xloom.vllm.plugin.input_gates import input_gates
from xloom.vllm.plugin.lora_metadata import prepare_indices, prepare_kernels, slots_of

_tables: list[GateTables] = []  # of this process's wrapper


def shrink(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    out: torch.Tensor,
    token_slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    no_lora: torch.Tensor,
    num_slots: torch.Tensor,
    scaling: float,
) -> None:
    """`gated_shrink` with this process's tables: an operator that torch.compile does not look into.

    Where gates may be made of the input that is first: always, since graphs are captured before any mixture is there.
    """
    meta = (token_slots, tokens, counts, starts, slots, no_lora, num_slots)
    if BATCH.input_gates:
        input_gates(x, lora_a, _tables[0], meta)
    gated_shrink(x, lora_a, out, _tables[0], meta, scaling)


def _no_fake(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    out: torch.Tensor,
    token_slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    no_lora: torch.Tensor,
    num_slots: torch.Tensor,
    scaling: float,
) -> None:
    return None


direct_register_custom_op(op_name="xloom_gated_shrink", op_func=shrink, mutates_args=["out"], fake_impl=_no_fake)


class GatedPunicaGPU(PunicaWrapperGPU):
    """vLLM's Triton punica wrapper with the gate."""

    manager: Any = None

    def attach(self, manager: Any) -> None:
        """Take the LoRA manager whose slots this wrapper serves."""
        self.manager = manager
        BATCH.linears, BATCH.gater = slices_of(manager), self
        config = manager.lora_config
        self.tables = GateTables(
            BATCH.linears, len(self._token_lora_indices), config.max_loras, config.max_lora_rank, self.device
        )
        _tables[:] = [self.tables]

    @property
    def makes_gates(self) -> bool:
        """Whether it can make gates of a linear's input."""
        return BATCH.input_gates

    def reserve(self, routing: SlotRouting) -> None:
        """Make room for the gates of a bundle that is being loaded."""
        self.tables.reserve(routing)

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        self.is_prefill = mapping.is_prefill
        adapter_ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        tokens = slots_of(adapter_ids, lora_index_to_id)
        samples = slots_of(np.asarray(mapping.prompt_mapping, dtype=np.int64), lora_index_to_id)
        prepare_indices(self, tokens, samples, max_loras, vocab_size)
        prepare_kernels(self.token_mapping_meta, tokens)
        prepare_kernels(self.prompt_mapping_meta, samples)
        BATCH.rows = rows_of(adapter_ids, self.manager)
        for entry in BATCH.rows:
            self.tables.describe_slot(entry)

    def set_gates(self, entry: SlotRows, gates: torch.Tensor) -> None:
        """Take the gates `[num_rows, M, K]` of a slot's rows for the step that comes, float32 on the device."""
        self.tables.put(entry, gates)

    def made_gates(self, entry: SlotRows) -> torch.Tensor:
        """They are where `input_gates` wrote them."""
        return self.tables.read(entry)

    def add_shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        meta = self.token_mapping_meta.meta_args(x.size(0), self.lora_config.specialize_active_lora)
        torch.ops.vllm.xloom_gated_shrink(x, lora_a_stacked, y, *meta, scale)
