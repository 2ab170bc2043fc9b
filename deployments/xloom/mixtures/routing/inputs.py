"""What the kinds share whose gates come from a linear's own input: a matrix R beside A, and what makes gates of R x."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from xloom.mixtures.options import ROUTER_FILE
from xloom.mixtures.routing.base import Routing, Source, keep_top_k


@dataclass(frozen=True)
class InputRouting(Routing):
    """Logits `R x + b` for each module, with x its input; b is minus infinity for an adapter that lacks the module."""

    source: ClassVar[Source] = Source.INPUT
    absolute: ClassVar[bool] = False  # whether the logits are |R x| + b

    activation: str  # softmax or sigmoid, of logits / temperature
    top_k: int | None
    temperature: float
    routers: tuple[tuple[Tensor, Tensor], ...]  # per module: R [K, in], b [K], float32

    @classmethod
    def read(cls, folder: Path, shared: Mapping[str, Any], options: Mapping[str, Any]) -> Self:
        tensors = load_file(folder / ROUTER_FILE)
        parts = [(f"{name}.router.weight", f"{name}.router.bias") for name in shared["modules"]]
        return cls(**shared, routers=tuple((tensors[r], tensors[b]) for r, b in parts), **options)

    def to(self, device: torch.device | str) -> Self:
        return dataclasses.replace(self, routers=tuple((r.to(device), b.to(device)) for r, b in self.routers))

    @property
    def gates_sum_to_one(self) -> bool:
        return self.activation == "softmax"

    def gates_of(self, product: Tensor, bias: Tensor) -> Tensor:
        """The gates `[..., K]` in float32 for `product = R x [..., K]` and b, which is broadcast to it."""
        product = product.float()
        logits = keep_top_k((product.abs() if self.absolute else product) + bias, self.top_k) / self.temperature
        return torch.sigmoid(logits) if self.activation == "sigmoid" else torch.softmax(logits, dim=-1)

    def gates(self, module: int, x: Tensor) -> Tensor:
        """The gates `[..., K]` of the module with that number, for its input `x [..., in]`; all in float32."""
        weight, bias = self.routers[module]
        return self.gates_of(x.float() @ weight.T, bias)


def with_absent(bias: Tensor, segment: tuple[tuple[int, int], ...]) -> Tensor:
    """b `[K]` of a module with minus infinity where an adapter is not in its segment."""
    absent = torch.full_like(bias, float("-inf"))
    held = [adapter for adapter, _ in segment]
    absent[held] = bias[held]
    return absent
