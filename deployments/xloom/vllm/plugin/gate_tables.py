"""The gates of a batch on the device, and which of them multiplies which rank of which slot.

A captured CUDA graph replays kernels with the addresses they had, so the kernels are handed tensors that never
move. The one tensor that grows, with the largest bundle, is found through an address kept in such a tensor.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

# Relied on: it copies through pinned memory, so that the host does not wait; vLLM 0.32.
from vllm.utils.torch_utils import async_tensor_h2d

from xloom.vllm.plugin.gates import SlotRouting, SlotRows

UNGATED = -1
ROUTER_FIELDS = 6  # of `GateTables.routers`
ABSOLUTE, SIGMOID = 1, 2  # bits of its last


class GateTables:
    """What the gated shrink reads.

    `gates [max_tokens, width]` float32: a row's gates, its bundle's `[M, K]` flattened; NaN where none were ever
    set, so that a row without gates is not answered with the plain sum of its adapters.
    `offsets [max_loras, num_linears, max_rank]` int32: where in its row a rank's gate lies, or `UNGATED`.
    `place [2]` int64: address and row stride of `gates`.

    For mixtures whose gates are made of a linear's input, `routers [max_loras, num_linears, 6]` int64: addresses of R
    `[K, in]` and b `[K]`, float32, or 0; where in a row of `gates` the linear's K lie; K; how many of them are kept;
    bits. `temperatures [max_loras]` float32.
    """

    def __init__(
        self, linears: dict[int, list[str]], max_tokens: int, max_loras: int, max_rank: int, device: torch.device | str
    ) -> None:
        self.first_linear: dict[int, int] = {}  # address of a linear's stacked A -> its first slice's number
        self._names: list[str] = []  # HF module name of each slice
        for address, slices in linears.items():
            self.first_linear[address] = len(self._names)
            self._names += slices
        self._described: dict[int, SlotRouting | None] = {}
        self._offsets: WeakKeyDictionary[SlotRouting, torch.Tensor] = WeakKeyDictionary()
        shape = (max_loras, len(self._names), max_rank)
        with torch.inference_mode(False):  # here and below: they are written to within inference mode and without
            self.offsets = torch.full(shape, UNGATED, dtype=torch.int32, device=device)
            self.routers = torch.zeros(*shape[:2], ROUTER_FIELDS, dtype=torch.int64, device=device)
            self.temperatures = torch.ones(max_loras, dtype=torch.float32, device=device)
            self.place = torch.zeros(2, dtype=torch.int64, device=device)
            self.gates = torch.empty(max_tokens, 0, dtype=torch.float32, device=device)
        self._widen(1)

    def reserve(self, routing: SlotRouting) -> None:
        """Make room for a bundle's gates: where it is loaded, so that a lack of memory refuses the bundle alone."""
        self._widen(len(routing.row) * routing.routing.num_adapters)

    def _widen(self, width: int) -> None:
        held = self.gates.shape[1]
        if width <= held:
            return
        with torch.inference_mode(False):
            gates = torch.full((len(self.gates), width), torch.nan, dtype=torch.float32, device=self.gates.device)
        gates[:, :held].copy_(self.gates)
        # The old table goes back to an allocator that hands it out again in the stream's order: after its readers.
        self.gates = gates
        async_tensor_h2d([gates.data_ptr(), gates.stride(0)], out=self.place)

    def describe_slot(self, entry: SlotRows) -> None:
        """Point each rank of a slot at its gate, when the slot holds another adapter than before."""
        routing = entry.routing
        if self._described.get(entry.slot) is routing:
            return
        if routing is None:
            self.offsets[entry.slot].fill_(UNGATED)
        else:
            self.reserve(routing)
            async_tensor_h2d(self._offsets_of(routing), out=self.offsets[entry.slot])
        self._describe_router(entry.slot, routing)
        self._described[entry.slot] = routing

    def _describe_router(self, slot: int, routing: SlotRouting | None) -> None:
        old = self._described.get(slot)
        if routing is not None and routing.inputs is not None:
            async_tensor_h2d(self._routers_of(routing), out=self.routers[slot])
            self.temperatures[slot].fill_(routing.inputs.temperature)
        elif old is not None and old.inputs is not None:
            self.routers[slot].zero_()

    def _routers_of(self, routing: SlotRouting) -> torch.Tensor:
        """A slot's `routers`, on the host."""
        inputs = routing.inputs
        assert inputs is not None
        found = torch.zeros(self.routers.shape[1:], dtype=torch.int64)
        count = inputs.num_adapters
        kept, kind = inputs.top_k or count, inputs.absolute * ABSOLUTE | (inputs.activation == "sigmoid") * SIGMOID
        for linear, name in enumerate(self._names):
            number = routing.row.get(name)
            if number is not None:
                weight, bias = inputs.routers[number]
                addresses = weight.data_ptr(), bias.data_ptr()
                found[linear] = torch.tensor([*addresses, number * count, count, kept, kind])
        return found

    def _offsets_of(self, routing: SlotRouting) -> torch.Tensor:
        """A slot's `offsets`, on the host; kept as long as the bundle, since slots change hands often."""
        offsets = self._offsets.get(routing)
        if offsets is None:
            offsets = torch.full(self.offsets.shape[1:], UNGATED, dtype=torch.int32)
            for linear, name in enumerate(self._names):
                number = routing.row.get(name)
                if number is not None:
                    adapters = routing.segments[number]
                    offsets[linear, : len(adapters)] = number * routing.routing.num_adapters + adapters
            self._offsets[routing] = offsets
        return offsets

    def put(self, entry: SlotRows, gates: torch.Tensor) -> None:
        """Write the gates `[num_rows, M, K]` of a slot's rows; they lie on the device.

        Raises `ValueError` for gates of another shape or device, which would be read as another bundle's.
        """
        assert entry.routing is not None
        rows = entry.rows
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        shape = (count, len(entry.routing.row), entry.routing.routing.num_adapters)
        if gates.shape != shape or gates.device != self.gates.device:
            raise ValueError(
                f"gates of {entry.routing.name or 'a bundle'} are {tuple(gates.shape)} on {gates.device}, "
                f"not {shape} on {self.gates.device}"
            )
        target = self.gates[:, : shape[1] * shape[2]]
        if isinstance(rows, slice):
            target[rows].copy_(gates.flatten(1))
        else:
            target.index_copy_(0, async_tensor_h2d(rows, device=self.gates.device), gates.flatten(1))

    def read(self, entry: SlotRows) -> torch.Tensor:
        """The gates `[num_rows, M, K]` of a slot's rows, as they are on the device by now."""
        assert entry.routing is not None
        shape, rows = (len(entry.routing.row), entry.routing.routing.num_adapters), entry.rows
        held = self.gates[:, : shape[0] * shape[1]]
        if isinstance(rows, slice):
            held = held[rows]
        else:
            held = held.index_select(0, async_tensor_h2d(rows, device=held.device))
        gates: torch.Tensor = held.unflatten(1, shape)
        return gates
