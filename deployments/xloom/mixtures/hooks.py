"""Gated LoRA on the linears of a Hugging Face model, by forward hooks: which rows run with which adapter and gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xloom.mixtures.lora import read_lora
from xloom.mixtures.mixing import gated_delta, rank_gates
from xloom.mixtures.routing.base import Routing
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.routing.inputs import InputRouting
from xloom.mixtures.routing.registry import load_routing, read_description
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.protocol import XloomError

_OPEN = torch.ones(())  # the gate of a plain adapter; without dimensions it multiplies on any device, in any dtype


@dataclass(frozen=True)
class GatedModule:
    """One linear's A `[R, in]` and B `[out, R]`, its scale in B; in a mixture also where its gates are."""

    a: Tensor
    b: Tensor
    index: int = 0  # the module's row in the gates
    columns: Tensor | None = None  # [R]: the adapter whose gate each rank takes
    constant: Tensor | None = None  # [K]: the gates of a mixture of constants, where a span has none
    router: InputRouting | None = None  # what makes the gates of x

    def gate(self, x: Tensor, given: Tensor | None, made: dict[int, Tensor] | None = None) -> Tensor:
        """What multiplies A x for `x [..., num_rows, in]`; `given [num_rows, M, K]` are the span's gates.

        Gates `[..., num_rows, K]` that are made of x join `made`, by the module's row.
        """
        if self.columns is None:
            return _OPEN
        if self.router is not None:
            gates = self.router.gates(self.index, x)
            if made is not None:
                made[self.index] = gates
        elif given is not None:
            gates = given[:, self.index]
        elif self.constant is not None:
            gates = self.constant
        else:
            return _OPEN
        return gates.index_select(-1, self.columns).to(self.a.dtype)


@dataclass(frozen=True)
class Adapter:
    """A prepared adapter, or a prepared bundle stacked into one, ready to run."""

    modules: Mapping[str, GatedModule]
    routing: XLoraRouting | None  # of an X-LoRA bundle: its spans need gates
    name: str = ""  # with its generation; for figures
    mixture: Routing | None = None  # of a mixture of any kind

    @classmethod
    def load(cls, prepared: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Adapter:
        """Read a prepared folder; `dtype` None keeps its own. Raises `XloomError` as `read_lora` does."""
        weights = read_lora(prepared)
        routing = load_routing(prepared).to(device) if read_description(prepared) else None
        places = {name: number for number, name in enumerate(routing.modules)} if routing else {}
        modules = {}
        for name, (a, b) in weights.tensors.items():
            kind = dtype or b.dtype
            if (scale := weights.scale(name)) != 1:
                b = b.float() * scale
            columns = constant = None
            if isinstance(routing, FixedRouting):
                constant = routing.gates()[0].to(device)
            if routing is not None:
                adapters = torch.arange(routing.num_adapters, device=device)
                columns = rank_gates(adapters, routing.segments[places[name]])
            router = routing if isinstance(routing, InputRouting) else None
            matrices = a.to(device, kind), b.to(device, kind)
            modules[name] = GatedModule(*matrices, places.get(name, 0), columns, constant, router)
        return cls(modules, routing if isinstance(routing, XLoraRouting) else None, mixture=routing)

    def check(self, linears: Mapping[str, nn.Module]) -> None:
        """Hold the adapter against the model's modules. Raises `XloomError` (wrong_base)."""
        for name, module in self.modules.items():
            weight = getattr(linears.get(name), "weight", None)
            if weight is None or tuple(weight.shape) != (module.b.shape[0], module.a.shape[1]):
                message = f"The adapter's {name} does not fit the base model."
                raise XloomError("wrong_base", message, "Use an adapter trained on this base model.")


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a batch that run with one adapter."""

    rows: slice
    adapter: Adapter
    gates: Tensor | None = None  # [num_rows, M, K]; None: all of them 1
    made: dict[int, Tensor] | None = None  # takes the gates that are made of inputs, by module


@contextmanager
def adapted(linears: Mapping[str, nn.Module], spans: Sequence[Span]) -> Iterator[None]:
    """Within it, every linear adds to each span's rows what the span's adapter has for it.

    Rows are the second to last axis of a linear's input. The model itself stays as it was.
    """
    touched: dict[str, list[Span]] = {}
    for span in spans:
        for name in span.adapter.modules:
            touched.setdefault(name, []).append(span)
    handles = [linears[name].register_forward_hook(_hook(name, on_it)) for name, on_it in touched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, spans: Sequence[Span]) -> Any:
    def add(linear: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        for span in spans:
            module = span.adapter.modules[name]
            x = args[0][..., span.rows, :]
            gate = module.gate(x, span.gates, span.made)
            result[..., span.rows, :] += gated_delta(x.to(module.a.dtype), module.a, module.b, gate).to(result.dtype)
        return result

    return add
