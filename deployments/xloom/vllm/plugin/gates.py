"""What the LoRA kernels need to know about one batch: which rows belong to which slot, and their gates.

One `LoRABatch` lives in each worker process. The worker's LoRA manager fills `rows` before a step; the model runner's
hooks set the gates before its forward pass; the punica wrappers read both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from xloom.mixtures.layer_means import layer_means
from xloom.mixtures.routing.base import Routing
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.inputs import InputRouting
from xloom.mixtures.routing.xlora import XLoraRouting

WIDENED_GATE_BYTES = 256 << 20  # above this the gates are widened to ranks linear by linear, not all at once


class GateLayout(NamedTuple):
    """The gates of all linears side by side, widened to the ranks that they multiply."""

    columns: torch.Tensor  # [sum of R]: which of a token's M * K gates
    places: dict[int, slice]  # address of a linear's stacked A -> its part of `columns`
    widths: list[int]  # of those parts, in their order


class SlotRouting:
    """A bundle's routing as the kernels want it: rows by module name, gates by rank."""

    def __init__(self, routing: Routing, name: str = "") -> None:
        self.routing = routing
        self.name = name  # the bundle's, with its generation
        self.row = {name: number for number, name in enumerate(routing.modules)}
        self.segments = [segment_index(segments) for segments in routing.segments]  # M times [R_m]
        self.constant = _constant(routing)
        self.inputs = routing if isinstance(routing, InputRouting) else None  # whose gates come of a linear's input
        self._layout: GateLayout | None = None
        self._layer_means: torch.Tensor | None = None

    def layer_means(self, device: torch.device) -> torch.Tensor:
        """As `xloom.mixtures.layer_means`, for all steps."""
        if self._layer_means is None:
            self._layer_means = layer_means(list(self.row)).to(device)
        return self._layer_means

    def layout(self, linears: Mapping[int, Sequence[str]]) -> GateLayout:
        """The same for all steps. `linears`: those of the model, as `slices_of` gives them."""
        if self._layout is None:
            found, places, first = [torch.zeros(0, dtype=torch.long)], {}, 0
            for address, names in linears.items():
                rows = [self.row[name] for name in names if name in self.row]
                found += [row * self.routing.num_adapters + self.segments[row] for row in rows]
                last = first + sum(len(self.segments[row]) for row in rows)
                places[address], first = slice(first, last), last
            widths = [place.stop - place.start for place in places.values()]
            self._layout = GateLayout(torch.cat(found), places, widths)
        return self._layout


def _constant(routing: Routing) -> torch.Tensor | None:
    """Gates `[M, K]` that are no token's own: a scaling pass's, or a fixed mixture's."""
    if isinstance(routing, XLoraRouting):
        return routing.scaling_pass_gates()
    return routing.gates() if isinstance(routing, FixedRouting) else None


def segment_index(segments: Sequence[Sequence[int]]) -> torch.Tensor:
    """`[R_m]`: the adapter index of each rank of a stacked A."""
    return torch.tensor([adapter for adapter, rank in segments for _ in range(rank)], dtype=torch.long)


@dataclass
class SlotRows:
    """The tokens of one LoRA slot in this batch."""

    adapter_id: int  # LoRARequest.lora_int_id
    slot: int
    rows: slice | torch.Tensor  # of the batch's token axis
    ranks: dict[str, int]  # HF module name -> rank; modules without LoRA are absent
    routing: SlotRouting | None  # None: a plain adapter
    # On CPU: the adapter's weights by linear and slot, which a slot holds again whenever the adapter is in it.
    weights: dict[tuple[int, int], Any] = field(default_factory=dict)
    gates: torch.Tensor | None = None  # [num_rows, sum of R] when widened, else [num_rows, M * K]
    widened: bool = False
    single: dict[int, torch.Tensor] = field(default_factory=dict)  # of a single row: [R] by linear
    # On CPU, of a mixture whose gates come from the linears' inputs: modules, and their gates [num_rows, slices, K].
    made: list[tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=list)

    @property
    def single_row(self) -> int | None:
        """The row's number, if there is but one."""
        rows = self.rows
        return rows.start if isinstance(rows, slice) and rows.stop - rows.start == 1 else None

    def set_gates(self, gates: torch.Tensor) -> None:
        """Take the gates `[num_rows, M, K]` of the next forward pass."""
        assert self.routing is not None
        if gates.stride(0) == 0:  # the same for all rows, which a product broadcasts by itself
            gates = gates[:1]
        layout, self.single = self.routing.layout(BATCH.linears), {}
        size = len(gates) * len(layout.columns) * 4
        self.gates, self.widened = gates.reshape(len(gates), -1), size <= WIDENED_GATE_BYTES
        if self.widened:
            self.gates = self.gates.index_select(1, layout.columns)
            if self.single_row is not None:
                self.single = dict(zip(layout.places, self.gates[0].split(layout.widths), strict=True))

    def gate_of(self, linear: int) -> torch.Tensor | None:
        """`[num_rows or 1, R]` to multiply between shrink and expand of a linear, all slices.

        None for a plain adapter, and for a mixture whose gates come from the linear's input.
        Raises `RuntimeError` for a bundle without gates, which would be the plain sum of its adapters.
        """
        if self.routing is None or self.routing.inputs is not None:
            return None
        if self.gates is None:
            raise RuntimeError(f"no gates for {self.routing.name} in this step")
        layout = self.routing.layout(BATCH.linears)
        place = layout.places[linear]
        return self.gates[:, place] if self.widened else self.gates.index_select(1, layout.columns[place])

    def single_gate_of(self, linear: int) -> torch.Tensor | None:
        """`gate_of` a single row, `[R]`."""
        if self.single and self.gates is not None:
            return self.single[linear]
        gate = self.gate_of(linear)
        return None if gate is None else gate[0]


class Gater(Protocol):
    """Where a slot's gates go before a forward pass; each punica wrapper keeps them its own way."""

    manager: Any  # vLLM's LoRAModelManager that it serves

    @property
    def makes_gates(self) -> bool:
        """Whether it can make gates of a linear's input."""

    def reserve(self, routing: SlotRouting) -> None:
        """Make room for the gates of a bundle that is being loaded."""

    def set_gates(self, entry: SlotRows, gates: torch.Tensor) -> None:
        """The next forward pass runs with these gates `[num_rows, M, K]`, float32."""

    def made_gates(self, entry: SlotRows) -> torch.Tensor:
        """The gates `[num_rows, M, K]` that the last forward pass made of the linears' inputs."""


@dataclass
class LoRABatch:
    """The LoRA state of the batch that is being run in this process."""

    rows: list[SlotRows] = field(default_factory=list)
    # Which linear a stacked weight belongs to: its address -> HF module names, one a slice.
    linears: dict[int, list[str]] = field(default_factory=dict)
    gater: Gater | None = None  # the punica wrapper of this process
    scheduler: type | None = None  # the class that schedules for it
    runner: type | None = None  # the class of the model runner
    mixtures: bool = False  # whether the engine was started for them
    input_gates: bool = False  # and whether, on a GPU, for gates that are made of inputs

    def gated(self) -> list[SlotRows]:
        """The rows whose gates have to be set before a forward pass; those of other mixtures come from their inputs."""
        return [entry for entry in self.rows if entry.routing is not None and entry.routing.inputs is None]

    def made(self) -> list[SlotRows]:
        """The rows whose gates are made of the linears' inputs."""
        return [entry for entry in self.rows if entry.routing is not None and entry.routing.inputs is not None]


BATCH = LoRABatch()


def slices_of(manager: Any) -> dict[int, list[str]]:
    """Address of each linear's stacked A -> the HF module names of its slices."""
    names: dict[int, list[str]] = {}
    for name, module in manager.modules.items():  # LoRAModelManager.modules and .packed_modules, vLLM 0.32
        stacked = getattr(module, "lora_a_stacked", None)
        if isinstance(stacked, tuple) and stacked:
            slices = manager.packed_modules.get(name, [name])
            names[stacked[0].data_ptr()] = slices if len(stacked) == len(slices) else [name] * len(stacked)
    return names


def ranks_of(manager: Any, model: Any) -> dict[str, int]:
    """HF module name -> the rank a loaded adapter (vLLM's `LoRAModel`) has there; kept on the adapter itself."""
    ranks: dict[str, int] | None = getattr(model, "xloom_ranks", None)
    if ranks is None:
        ranks = {}
        for name, weights in model.loras.items():
            packed = isinstance(weights.lora_a, list)
            parts = manager.packed_modules.get(name, [name]) if packed else [name]
            for part, matrix in zip(parts, weights.lora_a if packed else [weights.lora_a], strict=True):
                if matrix is not None:
                    ranks[part] = matrix.shape[0]
        model.xloom_ranks = ranks
    return ranks


def weights_of(model: Any) -> dict[tuple[int, int], Any]:
    """What a wrapper has made of a loaded adapter's weights; kept on the adapter itself."""
    weights: dict[tuple[int, int], Any] | None = getattr(model, "xloom_weights", None)
    if weights is None:
        weights = model.xloom_weights = {}
    return weights


def rows_of(token_adapter_ids: np.ndarray[Any, Any], manager: Any) -> list[SlotRows]:
    """Group the batch's tokens by LoRA slot. `token_adapter_ids` is `[num_tokens]`, 0 for the base model."""
    found = []
    for adapter_id in np.unique(token_adapter_ids).tolist():
        if adapter_id <= 0:
            continue
        indices = np.flatnonzero(token_adapter_ids == adapter_id)
        first, last = int(indices[0]), int(indices[-1]) + 1
        rows = slice(first, last) if last - first == len(indices) else torch.from_numpy(indices)
        model = manager._registered_adapters.cache[adapter_id]  # AdapterLRUCache; .cache leaves the order alone
        slot = manager.lora_index_to_id.index(adapter_id)
        routing: SlotRouting | None = getattr(model, "xloom_routing", None)
        found.append(SlotRows(adapter_id, slot, rows, ranks_of(manager, model), routing, weights_of(model)))
    return found
