"""The two routers that are trained: X-LoRA's classifier, and a linear on each linear's own input.

Both see their inputs centred and scaled by what a first batch showed, so that one learning rate suits models whose
channels differ by orders of magnitude. That is folded into the weights when they are written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from xloom.compose.mixture import Mixture
from xloom.compose.router import Router
from xloom.mixtures.routing.inputs import with_absent
from xloom.mixtures.routing.linear import LinearRouting
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.mixtures.stacking import Stack

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
        self.temperature, self.layerwise = temperature, layerwise
        self._form = XLoraRouting(
            **stack.described,
            hidden_size=hidden,
            layerwise_scalings=layerwise,
            mixing_mode="additive",
            enable_softmax=True,
            temperature=temperature,
            top_k=None,
            enable_softmax_topk=False,
            scaling_pass_value=self.scaling_pass,
            layers=(),
        )
        outputs = len(stack.names) * (len(stack.modules) if layerwise else 1)
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
        found = replace(self._form, layers=tuple(self.folded())).gates(hidden.flatten(0, 1))
        self._gates = found.unflatten(0, hidden.shape[:2])

    def gates(self, place: int, x: Tensor) -> Tensor:
        assert self._gates is not None
        return self._gates[..., place, :]

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
        self.names = stack.modules
        self._form = LinearRouting(
            **stack.described,
            activation=activation,
            top_k=top_k,
            temperature=temperature,
            routers=(),
        )
        count = len(stack.names)
        widths = [stack.tensors[name][0].shape[1] for name in stack.modules]
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

    def gates(self, place: int, x: Tensor) -> Tensor:
        weight, bias = self.folded(place)
        return self._form.gates_of(linear(x.float(), weight), with_absent(bias, self._form.segments[place]))

    def normalised(self, place: int, x: Tensor) -> Tensor:
        """A linear's input `[..., in]` as `weights` and `biases` take it."""
        return (x.float() - self.get_buffer(f"mean_{place}")) / self.get_buffer(f"deviation_{place}")

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
