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
from xloom.mixtures.options import XLORA_FILE
from xloom.mixtures.routing import Routing
from xloom.protocol import XloomError

_OPEN = torch.ones(())  # the gate of a plain adapter; without dimensions it multiplies on any device, in any dtype


@dataclass(frozen=True)
class GatedModule:
    """One linear's A `[R, in]` and B `[out, R]`, its scale in B; in a bundle also where its gates are."""

    a: Tensor
    b: Tensor
    index: int = 0  # the module's row in the gates
    columns: Tensor | None = None  # [R]: the adapter whose gate each rank takes


@dataclass(frozen=True)
class Adapter:
    """A prepared adapter, or a prepared bundle stacked into one, ready to run."""

    modules: Mapping[str, GatedModule]
    routing: Routing | None  # of a bundle
    name: str = ""  # with its generation; for figures

    @classmethod
    def load(cls, prepared: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Adapter:
        """Read a prepared folder; `dtype` None keeps its own. Raises `XloomError` as `read_lora` does."""
        weights = read_lora(prepared)
        routing = Routing.load(prepared).to(device) if (prepared / XLORA_FILE).is_file() else None
        places = {name: number for number, name in enumerate(routing.modules)} if routing else {}
        modules = {}
        for name, (a, b) in weights.tensors.items():
            kind = dtype or b.dtype
            if (scale := weights.scale(name)) != 1:
                b = b.float() * scale
            columns = None
            if routing is not None:
                adapters = torch.arange(routing.num_adapters, device=device)
                columns = rank_gates(adapters, routing.segments[places[name]])
            modules[name] = GatedModule(a.to(device, kind), b.to(device, kind), places.get(name, 0), columns)
        return cls(modules, routing)

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
            gate = _OPEN
            if span.gates is not None and module.columns is not None:
                gate = span.gates[:, module.index].index_select(-1, module.columns).to(module.a.dtype)
            x = args[0][..., span.rows, :].to(module.a.dtype)
            result[..., span.rows, :] += gated_delta(x, module.a, module.b, gate).to(result.dtype)
        return result

    return add
