"""What gives the gates of a mixture while a router is trained or judged: the seam, and the kinds without training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from xloom.mixtures.routing.inputs import InputRouting
from xloom.mixtures.routing.xlora import XLoraRouting

_SURE = 1e-6  # how near 0 and 1 a sigmoid's gate is told apart from them


class Router(nn.Module):
    """Gates for K adapters at M linears. Rows are the tokens of a batch, `[batch, tokens]`."""

    scaling_pass: float | None = None  # the gates of a pass before, whose last hidden states are wanted; None: no pass

    def begin(self, hidden: Tensor | None) -> None:
        """A forward pass begins; `hidden` `[batch, tokens, hidden]` are those of the scaling pass, if there was one."""

    @abstractmethod
    def gates(self, place: int, x: Tensor) -> Tensor:
        """The gates `[batch, tokens, K]` of the linear at `place` in the stack, whose input is `x`."""


class ConstantRouter(Router):
    """The same weights everywhere: one adapter alone, or all of them alike."""

    def __init__(self, weights: Sequence[float], device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._weights = torch.tensor(weights, device=device)

    def gates(self, place: int, x: Tensor) -> Tensor:
        return self._weights.expand(*x.shape[:-1], -1)


class InputRouter(Router):
    """A routing on the linears' own inputs, as it is served: Arrow."""

    def __init__(self, routing: InputRouting) -> None:
        super().__init__()
        self.routing = routing

    def gates(self, place: int, x: Tensor) -> Tensor:
        return self.routing.gates(place, x)


class BundleRouter(Router):
    """An X-LoRA bundle's own classifier, exactly as it is served."""

    def __init__(self, routing: XLoraRouting, weight: float = 1.0) -> None:
        super().__init__()
        self.scaling_pass = routing.scaling_pass_value
        self._routing, self._weight = routing, weight  # the weight: global_scaling_weight
        self._gates: Tensor | None = None

    def begin(self, hidden: Tensor | None) -> None:
        assert hidden is not None
        found = self._routing.gates(hidden.flatten(0, 1))
        self._gates = found.unflatten(0, hidden.shape[:2]) * self._weight

    def logits(self, hidden: Tensor, activation: str) -> Tensor:
        """The logits `[num_tokens, M or 1, K]` whose softmax or sigmoid are its gates, before any top k.

        `hidden` `[batch, tokens, hidden]` are the scaling pass's.
        """
        rows = hidden.flatten(0, 1)
        if activation == "softmax":
            return self._routing.logits(rows) / self._routing.temperature
        every = replace(self._routing, top_k=None, enable_softmax_topk=False)
        return torch.logit(every.gates(rows) * self._weight, eps=_SURE)

    def scaling_gates(self, place: int) -> Tensor:
        """The constant gates `[K]` of the scaling pass."""
        return self._routing.scaling_pass_gates()[place] * self._weight

    def gates(self, place: int, x: Tensor) -> Tensor:
        assert self._gates is not None
        return self._gates[..., place, :]
