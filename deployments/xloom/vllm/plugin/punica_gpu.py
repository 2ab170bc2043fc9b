"""LoRA on GPU, gated: vLLM's Triton shrink and expand kernels with a gate between them.

All that varies from step to step lies in tensors of fixed address, so that captured CUDA graphs see it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping

# Relied on: PunicaWrapperGPU.{add_shrink,add_expand,update_metadata,_token_lora_indices}; vLLM 0.32.
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import direct_register_custom_op

from xloom.vllm.plugin.gates import BATCH, SlotRows, rows_of, slices_of

MAX_ADAPTERS = 16  # adapters in one bundle


class GateTables:
    """The gates of all tokens, and which gate multiplies which rank of which slot.

    `gates [num_linears, max_tokens, MAX_ADAPTERS + 1]` float32, its last column 1 for ungated ranks;
    `column [max_loras + 1, num_linears, max_rank]`, its last row for tokens without LoRA.
    """

    def __init__(
        self, linears: dict[int, list[str]], max_tokens: int, max_loras: int, max_rank: int, device: torch.device | str
    ) -> None:
        names = [name for slices in linears.values() for name in slices]
        self.row = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.rows_of = {address: [self.row[name] for name in slices] for address, slices in linears.items()}
        self._described: dict[int, int] = {}  # slot -> adapter id
        self.gates = torch.ones(len(self.row), max_tokens, MAX_ADAPTERS + 1, dtype=torch.float32, device=device)
        self.column = torch.full(
            (max_loras + 1, len(self.row), max_rank), MAX_ADAPTERS, dtype=torch.long, device=device
        )

    def describe_slot(self, entry: SlotRows) -> None:
        """Point each rank of a slot at its gate, when the slot's adapter has changed."""
        if self._described.get(entry.slot) == entry.adapter_id:
            return
        column = torch.full(self.column.shape[1:], MAX_ADAPTERS, dtype=torch.long)
        if entry.routing is not None:
            for name, number in entry.routing.row.items():
                segments = entry.routing.segments[number]
                column[self.row[name], : len(segments)] = segments
        self.column[entry.slot].copy_(column)
        self._described[entry.slot] = entry.adapter_id

    def put(self, entry: SlotRows, gates: torch.Tensor) -> None:
        """Write a slot's gates `[num_rows or 1, M, K]`."""
        assert entry.routing is not None
        if gates.shape[2] > MAX_ADAPTERS:
            raise ValueError(f"a bundle has {gates.shape[2]} adapters; at most {MAX_ADAPTERS} are supported on GPU")
        linears = torch.tensor([self.row[name] for name in entry.routing.row], device=self.gates.device)
        rows = entry.rows
        tokens = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        tokens = tokens.to(self.gates.device)
        values = gates.transpose(0, 1).expand(len(linears), len(tokens), gates.shape[2])
        self.gates[linears[:, None], tokens[None, :], : gates.shape[2]] = values

    def apply(self, buffer: torch.Tensor, address: int, slots: torch.Tensor) -> None:
        """Multiply `buffer [slices, num_tokens, rank]` by its gates in place; `slots [num_tokens]`, -1 without LoRA."""
        num_tokens = buffer.shape[1]
        for part, row in enumerate(self.rows_of.get(address, ())):
            columns = self.column[slots, row]  # -1 is the last row: ungated
            buffer[part].mul_(self.gates[row, :num_tokens].gather(1, columns[:, : buffer.shape[2]]))


_TABLES: list[GateTables] = []  # of this process's wrapper
_SLOTS: list[torch.Tensor] = []


def gate(buffer: torch.Tensor, lora_a: torch.Tensor) -> None:
    """Gate a shrunk buffer in place; `lora_a` tells which linear it is."""
    _TABLES[0].apply(buffer, lora_a.data_ptr(), _SLOTS[0][: buffer.shape[1]])


def _no_fake(buffer: torch.Tensor, lora_a: torch.Tensor) -> None:
    return None


direct_register_custom_op(op_name="xloom_gate", op_func=gate, mutates_args=["buffer"], fake_impl=_no_fake)


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
        _TABLES[:], _SLOTS[:] = [self.tables], [self._token_lora_indices]

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        BATCH.rows = rows_of(np.asarray(mapping.index_mapping), self.manager)
        for entry in BATCH.rows:
            self.tables.describe_slot(entry)

    def leave_out(self, entry: SlotRows) -> None:
        assert entry.routing is not None
        self.tables.put(entry, torch.zeros(1, len(entry.routing.row), entry.routing.routing.num_adapters))

    def set_gates(self, entry: SlotRows, gates: torch.Tensor) -> None:
        self.tables.put(entry, gates)

    def add_shrink(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        torch.ops.vllm.xloom_gate(y, lora_a_stacked[0])
