"""An adapter's weights in its slot on CPU, and the products with them: plain for few rows, oneDNN's for many.

Relies on vLLM 0.32: `vllm._custom_ops.create_onednn_mm` and `onednn_mm`, which its own CPU linears use
(`vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops

PACKED_FROM = 1 << 16  # numbers in a weight: where oneDNN's packed product begins to be quicker than a plain one
ROWS_FROM = 8  # and rows; with less of either its call costs more than it saves


class Weight:
    """A weight `[out, in]` as it lies in the slot, and packed once it is worth it."""

    def __init__(self, weight: Tensor) -> None:
        self._transposed = weight.t()
        self._large = weight.numel() >= PACKED_FROM and ops._supports_onednn
        self._packed: Any = None

    def product(self, x: Tensor) -> Tensor:
        """x W^T `[num_rows, out]` for `x [num_rows, in]`."""
        if self._large and len(x) >= ROWS_FROM and (packed := self._pack()) is not None:
            result: Tensor = ops.onednn_mm(packed, x, None)
            return result
        return x @ self._transposed

    def add_product(self, y: Tensor, x: Tensor) -> None:
        """Add x W^T to `y [num_rows, out]`."""
        if self._large and len(x) >= ROWS_FROM and (packed := self._pack()) is not None:
            y += ops.onednn_mm(packed, x, None)
        else:
            y.addmm_(x, self._transposed)

    def _pack(self) -> Any:
        if self._packed is None:
            try:
                packed = ops.create_onednn_mm(self._transposed, 32)
                ops.onednn_mm(packed, self._transposed.t()[:1].new_zeros(1, packed.k), None)  # some dtypes fail here
                self._packed = packed
            except RuntimeError:
                self._large = False
        return self._packed


@dataclass(frozen=True)
class SlotSlice:
    """An adapter's A and B for one output slice of a linear."""

    name: str  # HF module name
    outputs: slice  # of the linear's output
    a: Weight  # [rank, in]
    b: Weight  # [out_slice, rank]


def slot_slices(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], slot: int, names: Sequence[str], ranks: dict[str, int]
) -> tuple[SlotSlice, ...]:
    """The slices of one linear that an adapter in this slot changes, at its own ranks.

    `lora_a`, `lora_b`: one a slice, `[slots, 1, rank, in]` and `[slots, 1, out_slice, rank]`.
    """
    found, offset = [], 0
    for a, b, name in zip(lora_a, lora_b, names, strict=True):
        width, rank = b.shape[2], ranks.get(name, 0)
        if rank:
            outputs = slice(offset, offset + width)
            found.append(SlotSlice(name, outputs, Weight(a[slot, 0, :rank]), Weight(b[slot, 0, :, :rank])))
        offset += width
    return tuple(found)
