"""An adapter's weights in its slot on CPU, and the products with them: plain for small ones, oneDNN's for large.

Relies on vLLM 0.32: `vllm._custom_ops.create_onednn_mm` and `onednn_mm`, which its own CPU linears use
(`vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from xloom.mixtures.routing.inputs import InputRouting
from xloom.vllm.plugin.gates import SlotRouting

# Numbers in a weight: where oneDNN's packed product begins to be quicker than a plain one, with 2 to 16 rows up to
# three times as quick.
PACKED_FROM = 1 << 15

Made = list[tuple[tuple[int, ...], Tensor]]  # `SlotRows.made`


class Shrink:
    """The A `[rank, in]` of all slices of a linear."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        weight = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        self._packed = _pack(weight)
        self._transposed = weight.t() if self._packed is None else None

    def product(self, x: Tensor) -> Tensor:
        """x A^T `[num_rows, rank]` for `x [num_rows, in]`."""
        if self._transposed is not None:
            return x @ self._transposed
        result: Tensor = ops.onednn_mm(self._packed, x, None)
        return result


class Expand:
    """The B `[out, rank]` of a slice, as it lies in the slot, and packed as well if that pays."""

    def __init__(self, weight: Tensor) -> None:
        self._packed, self._transposed = _pack(weight), weight.t()

    def add_product(self, y: Tensor, x: Tensor) -> None:
        """Add x B^T to `y [num_rows, out]`, for `x [num_rows, rank]`."""
        if self._packed is None:
            y.addmm_(x, self._transposed)
        else:
            y += ops.onednn_mm(self._packed, x, None)


def _pack(weight: Tensor) -> Any:
    """The weight as oneDNN wants it; None where that does not pay, or it does not take the dtype."""
    if weight.numel() < PACKED_FROM or not ops._supports_onednn:
        return None
    try:
        packed = ops.create_onednn_mm(weight.t(), 32)
        ops.onednn_mm(packed, weight.new_zeros(1, packed.k), None)
    except RuntimeError:
        return None
    return packed


@dataclass(frozen=True)
class SlotSlice:
    """An adapter's B for one output slice of a linear."""

    outputs: slice  # of the linear's output
    ranks: slice  # of what is expanded
    b: Expand  # [out_slice, rank]


@dataclass(frozen=True)
class SlotRouter:
    """What makes a mixture's gates of one linear's input; its R lie under A, so that one product gives both."""

    routing: InputRouting
    bias: Tensor  # [slices, K] float32
    columns: Tensor  # [sum of ranks]: which of a row's slices * K gates multiplies each rank
    modules: tuple[int, ...]  # the slices', as the routing counts them

    def gates(self, product: Tensor, made: Made) -> Tensor:
        """`[num_rows, sum of ranks]` float32, of R x `[num_rows, slices * K]`; what they are made of joins `made`."""
        gates = self.routing.gates_of(product.view(len(product), *self.bias.shape), self.bias)
        made.append((self.modules, gates))
        return gates.flatten(1).index_select(1, self.columns)


class SingleRow:
    """The products of one row, with the weights as they lie in the slot.

    They take as long as the weights take to read, and beside that each operator counts: there are as few as may be.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[tuple[int, Tensor]], router: SlotRouter | None = None) -> None:
        """`a`: `[rank, in]` of each slice, and with a router R `[K, in]` of each; `b`: where each slice begins in the
        output, and `[out_slice, rank]`.
        """
        heights = [len(each) for each in a]
        product = a[0].new_empty(sum(heights))  # used anew in each step
        parts = product.split(heights)
        self._shrink = list(zip(a, parts, strict=True))
        self._expand = [(first, len(each), each, part) for (first, each), part in zip(b, parts, strict=False)]
        num_ranks = sum(heights[: len(b)])
        self._shrunk, self._logits, self._router = product[:num_ranks], product[num_ranks:], router

    def add_product(self, y: Tensor, x: Tensor, gate: Tensor | None, made: Made) -> None:
        """Add B (gate * A x) to `y [out]`, for `x [in]` and `gate [sum of ranks]`; `made` as of `SlotRouter`."""
        for weight, part in self._shrink:
            torch.mv(weight, x, out=part)
        if self._router is not None:
            gate = self._router.gates(self._logits[None], made)[0]
        if gate is not None:
            if gate.shape != self._shrunk.shape:
                raise RuntimeError(f"gates {tuple(gate.shape)} for ranks {tuple(self._shrunk.shape)}")
            self._shrunk.mul_(gate)
        for first, width, weight, part in self._expand:
            y.narrow(0, first, width).addmv_(weight, part)


@dataclass(frozen=True)
class SlotLinear:
    """An adapter's weights for one linear: all slices shrink in one product."""

    a: Shrink  # [sum of ranks (+ slices * K), in]
    slices: tuple[SlotSlice, ...]
    num_ranks: int
    single: SingleRow
    router: SlotRouter | None = None

    def shrink(self, x: Tensor, made: Made) -> tuple[Tensor, Tensor | None]:
        """A x `[num_rows, sum of ranks]` for `x [num_rows, in]`, and the gates that are made of x, if any are."""
        product = self.a.product(x)
        if self.router is None:
            return product, None
        return product[:, : self.num_ranks], self.router.gates(product[:, self.num_ranks :], made)


def slot_linear(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    slot: int,
    names: Sequence[str],
    ranks: dict[str, int],
    routing: SlotRouting | None = None,
) -> SlotLinear | None:
    """What an adapter in this slot changes of one linear, at its own ranks; None if nothing.

    `lora_a`, `lora_b`: one a slice, `[slots, 1, rank, in]` and `[slots, 1, out_slice, rank]`.
    """
    shrinks, expands, slices, first, done = [], [], [], 0, 0
    held = []  # names of the slices
    for a, b, name in zip(lora_a, lora_b, names, strict=True):
        width, rank = b.shape[2], ranks.get(name, 0)
        if rank:
            shrinks.append(a[slot, 0, :rank])
            expands.append((first, b[slot, 0, :, :rank]))
            slices.append(SlotSlice(slice(first, first + width), slice(done, done + rank), Expand(expands[-1][1])))
            held.append(name)
        first, done = first + width, done + rank
    if not slices:
        return None
    if routing is None or routing.inputs is None:
        return SlotLinear(Shrink(shrinks), tuple(slices), done, SingleRow(shrinks, expands))
    inputs, count = routing.inputs, routing.inputs.num_adapters
    rows = [routing.row[name] for name in held]
    weights = [inputs.routers[row][0].to(shrinks[0].dtype) for row in rows]
    columns = torch.cat([place * count + routing.segments[row] for place, row in enumerate(rows)])
    router = SlotRouter(inputs, torch.stack([inputs.routers[row][1] for row in rows]), columns, tuple(rows))
    stacked = [*shrinks, *weights]
    return SlotLinear(Shrink(stacked), tuple(slices), done, SingleRow(stacked, expands, router), router)
