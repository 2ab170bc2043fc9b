"""The two routers that are trained: X-LoRA's classifier, and a linear on each linear's own input.

Both see their inputs centred and scaled by what a first batch showed, so that one learning rate suits models whose
channels differ by orders of magnitude. That is folded into the weights when they are written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xloom.compose.mixture import Mixture
from xloom.compose.router import Router
from xloom.compose.stack import Stack

_SMALLEST = 1e-4  # of the largest deviation of a linear's channels; one that never moves is not blown up


class LearnedRouter(Router):
    """A router with parameters."""

    temperature: float

    @abstractmethod
    def look(self, mixture: Mixture, ids: Tensor) -> None:
        """Take the inputs' mean and deviation from a batch, under the base model."""


class ClassifierRouter(LearnedRouter):
    """X-LoRA's classifier, as peft.tuners.xlora.classifier.XLoraClassifier (0.21): `depth` linears, ReLU between."""

    scaling_pass = 0.0

    def __init__(
        self, stack: Stack, hidden: int, *, depth: int, size: int, layerwise: bool, temperature: float
    ) -> None:
        super().__init__()
        self.temperature, self.layerwise, self.num_linears = temperature, layerwise, len(stack.linears)
        self.num_adapters = len(stack.names)
        outputs = self.num_adapters * (self.num_linears if layerwise else 1)
        sizes = [hidden, *[size] * (depth - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(depth))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # all adapters alike, to begin with
        nn.init.zeros_(last.bias)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("deviation", torch.ones(hidden))
        self._gates: Tensor | None = None

    @torch.no_grad()
    def look(self, mixture: Mixture, ids: Tensor) -> None:
        hidden = mixture.base_hidden(ids).float().flatten(0, 1)
        self.mean.copy_(hidden.mean(0))
        self.deviation.copy_(_deviation(hidden))

    def begin(self, hidden: Tensor | None) -> None:
        assert hidden is not None
        found = hidden.float()
        for number, (weight, bias) in enumerate(self.folded()):
            found = linear(torch.relu(found) if number else found, weight, bias)
        found = found.unflatten(-1, (-1, self.num_adapters))  # [batch, tokens, M or 1, K]
        self._gates = torch.softmax(found / self.temperature, dim=-1)

    def gates(self, place: int, x: Tensor) -> Tensor:
        assert self._gates is not None
        return self._gates[..., place if self.layerwise else 0, :]

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer as PEFT has them, for the hidden states as they are."""
        pairs = [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]
        return [_fold(*pairs[0], self.mean, self.deviation), *pairs[1:]]


class LinearRouter(LearnedRouter):
    """Softmax or sigmoid of (R x + b) / T for each linear; see `xloom.mixtures.linear_router`."""

    def __init__(
        self, stack: Stack, *, activation: str = "softmax", temperature: float = 1.0, top_k: int | None = None
    ) -> None:
        super().__init__()
        self.activation, self.temperature, self.top_k = activation, temperature, top_k
        self.names = [each.name for each in stack.linears]
        self._present = [each.present for each in stack.linears]
        count = len(stack.names)
        widths = [each.a.shape[1] for each in stack.linears]
        self.weights = nn.ParameterList(torch.zeros(count, width) for width in widths)
        self.biases = nn.ParameterList(torch.zeros(count) for _ in widths)
        for place, width in enumerate(widths):
            self.register_buffer(f"mean_{place}", torch.zeros(width))
            self.register_buffer(f"deviation_{place}", torch.ones(width))

    @torch.no_grad()
    def look(self, mixture: Mixture, ids: Tensor) -> None:
        def take(place: int, x: Tensor, gates: Tensor) -> None:
            flat = x.float().flatten(0, 1)
            self.get_buffer(f"mean_{place}").copy_(flat.mean(0))
            self.get_buffer(f"deviation_{place}").copy_(_deviation(flat))

        mixture.watch(ids, None, take)

    def logits(self, place: int, x: Tensor) -> Tensor:
        """The logits `[batch, tokens, K]` over the temperature; -inf for an adapter that lacks the linear."""
        found = linear(x.float(), *self.folded(place)) / self.temperature
        return found.masked_fill(~self._present[place], float("-inf"))

    def gates(self, place: int, x: Tensor) -> Tensor:
        logits = self.logits(place, x)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, dim=-1).indices
            logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
        return torch.sigmoid(logits) if self.activation == "sigmoid" else torch.softmax(logits, dim=-1)

    def folded(self, place: int) -> tuple[Tensor, Tensor]:
        """R `[K, in]` and b `[K]` of one linear, for its input as it is."""
        mean, deviation = self.get_buffer(f"mean_{place}"), self.get_buffer(f"deviation_{place}")
        return _fold(self.weights[place], self.biases[place], mean, deviation)


def _deviation(rows: Tensor) -> Tensor:
    found = rows.std(0)
    return found.clamp_min(max(float(found.max()) * _SMALLEST, 1e-12))


def _fold(weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """The layer for x that is `weight` and `bias` for (x - mean) / deviation."""
    folded = weight / deviation
    return folded, bias - folded @ mean


def parameters_of(router: nn.Module) -> Sequence[nn.Parameter]:
    """What is trained of a router, in a fixed order."""
    return [parameter for _, parameter in sorted(router.named_parameters())]
