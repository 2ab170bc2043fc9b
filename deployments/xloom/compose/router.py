"""What gives the gates of a mixture while a router is trained or judged: the seam, and the kinds without training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.linalg import svd

from xloom.compose.stack import Stack


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


class ArrowRouter(Router):
    """Softmax over the top k of |R x| / T, with R the top right singular vector of each B A, scales left out.

    As peft.tuners.lora.arrow.ArrowLoraLinearLayer (0.21); Ostapenko et al. 2024, arXiv 2405.11157.
    """

    def __init__(self, stack: Stack, top_k: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.top_k, self.temperature = top_k, temperature
        self._present = [linear.present for linear in stack.linears]
        self._prototypes = [
            torch.stack([_direction(linear.a, linear.b, linear.columns == k) for k in range(len(stack.names))])
            for linear in stack.linears
        ]

    def gates(self, place: int, x: Tensor) -> Tensor:
        scores = (x.float() @ self._prototypes[place].T).abs()
        scores = scores.masked_fill(~self._present[place], float("-inf"))
        if self.top_k < scores.shape[-1]:
            kept = scores.topk(self.top_k, dim=-1).indices
            scores = torch.full_like(scores, float("-inf")).scatter(-1, kept, scores.gather(-1, kept))
        return torch.softmax(scores / self.temperature, dim=-1)


def _direction(a: Tensor, b: Tensor, ranks: Tensor) -> Tensor:
    """The top right singular vector `[in]` of B A over these ranks; zeros without any."""
    if not ranks.any():
        return torch.zeros(a.shape[1], device=a.device)
    # B A = Q_b (R_b R_a^T) Q_a^T: the vectors of the small matrix in the middle, turned by Q_a.
    turned, right = torch.linalg.qr(a[ranks].float().T)
    _, middle = torch.linalg.qr(b[:, ranks].float())
    found: Tensor = turned @ svd(middle @ right.T).Vh[0]
    return found


class HiddenRouting(Protocol):
    """What is asked of a prepared bundle's routing."""

    @property
    def scaling_pass_value(self) -> float: ...

    def to(self, device: torch.device | str) -> HiddenRouting: ...

    def gates(self, hidden: Tensor) -> Tensor: ...

    def scaling_pass_gates(self) -> Tensor: ...


class BundleRouter(Router):
    """An X-LoRA bundle's own classifier, exactly as it is served."""

    def __init__(self, routing: HiddenRouting, weight: float = 1.0) -> None:
        super().__init__()
        self.scaling_pass = routing.scaling_pass_value
        self._routing, self._weight = routing, weight  # the weight: global_scaling_weight
        self._gates: Tensor | None = None

    def begin(self, hidden: Tensor | None) -> None:
        assert hidden is not None
        found = self._routing.gates(hidden.flatten(0, 1))
        self._gates = found.unflatten(0, hidden.shape[:2]) * self._weight

    def scaling_gates(self, place: int) -> Tensor:
        """The constant gates `[K]` of the scaling pass."""
        return self._routing.scaling_pass_gates()[place] * self._weight

    def gates(self, place: int, x: Tensor) -> Tensor:
        assert self._gates is not None
        return self._gates[..., place, :]
