"""`xlora`: from a token's hidden state to its gates, everything X-LoRA does after the scaling pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from xloom.mixtures.options import ROUTER_FILE
from xloom.mixtures.routing.base import Routing, Source


def select(gates: Tensor, top_k: int | None, softmax_topk: bool) -> Tensor:
    """Keep each row's `top_k` largest gates `[..., K]`, and with `softmax_topk` renormalise those that are not zero.

    As peft.tuners.xlora.layer.XLoraLayer.get_maybe_topk_scalings (0.21).
    """
    if top_k is not None:
        kept = torch.topk(gates, k=top_k, dim=-1).indices
        gates = gates * torch.zeros_like(gates).scatter_(-1, kept, 1.0)
    if softmax_topk:
        zero = gates == 0
        gates = torch.softmax(gates.masked_fill(zero, float("-inf")), dim=-1).masked_fill(zero, 0.0)
    return gates


@dataclass(frozen=True)
class XLoraRouting(Routing):
    """A classifier over the last hidden state of a token's scaling sequence."""

    kind: ClassVar[str] = "xlora"
    source: ClassVar[Source] = Source.HIDDEN

    hidden_size: int
    layerwise_scalings: bool
    mixing_mode: str
    enable_softmax: bool
    temperature: float
    top_k: int | None
    enable_softmax_topk: bool
    scaling_pass_value: float
    layers: tuple[tuple[Tensor, Tensor | None], ...]  # float32 weight [out, in] and bias; ReLU between
    routing_passes: int = 2
    prefill: str = "exact"  # of one pass

    @classmethod
    def read(cls, folder: Path, shared: Mapping[str, Any], options: Mapping[str, Any]) -> Self:
        tensors = load_file(folder / ROUTER_FILE)
        count = sum(key.endswith(".weight") for key in tensors)
        layers = tuple((tensors[f"layers.{i}.weight"], tensors.get(f"layers.{i}.bias")) for i in range(count))
        return cls(**shared, layers=layers, **options)

    def to(self, device: torch.device | str) -> Self:
        layers = tuple((w.to(device), None if b is None else b.to(device)) for w, b in self.layers)
        return dataclasses.replace(self, layers=layers)

    @property
    def gates_sum_to_one(self) -> bool:
        if self.mixing_mode == "gated":
            return False
        return self.enable_softmax_topk or (self.enable_softmax and self.top_k is None)

    def logits(self, hidden: Tensor) -> Tensor:
        """The classifier's logits `[num_tokens, M or 1, K]` in float32; 1 where they are the same for every module."""
        hidden = hidden.float()
        for number, (weight, bias) in enumerate(self.layers):
            hidden = linear(torch.relu(hidden) if number else hidden, weight, bias)
        return hidden.view(-1, len(self.modules) if self.layerwise_scalings else 1, self.num_adapters)

    def gates(self, hidden: Tensor) -> Tensor:
        """The gates `[num_tokens, M, K]`, float32, of tokens with last hidden states `hidden` `[num_tokens, hidden]`.

        `hidden` comes from the scaling pass, after the final norm. When the gates are the same for every module, the
        result is a broadcast view.
        """
        logits = self.logits(hidden)
        if self.mixing_mode == "gated":
            gates = select(torch.sigmoid(logits / self.temperature), self.top_k, softmax_topk=False)
        else:
            if self.enable_softmax:
                logits = torch.softmax(logits / self.temperature, dim=-1)
            gates = select(logits, self.top_k, self.enable_softmax_topk)
        return gates.expand(-1, len(self.modules), -1)

    def scaling_pass_gates(self) -> Tensor:
        """The constant gates `[M, K]`, float32, of the scaling pass."""
        device = self.layers[0][0].device
        constant = torch.full((len(self.modules), self.num_adapters), self.scaling_pass_value, device=device)
        return select(constant, self.top_k, self.enable_softmax_topk and self.mixing_mode != "gated")
