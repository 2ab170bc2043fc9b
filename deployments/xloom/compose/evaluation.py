"""The table at the end: held-out perplexity and mean gates of each way to mix the same adapters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from xloom.compose.mixture import Mixture
from xloom.compose.router import ConstantRouter, InputRouter, Router
from xloom.mixtures.lora import LoraWeights
from xloom.mixtures.routing.arrow import ArrowRouting

ROWS_AT_ONCE = 4
ARROW_TEMPERATURES = (0.25, 1.0, 4.0)


@dataclass
class Figures:
    """Way to mix -> column -> value."""

    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    gates: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # -> adapter -> mean gate


@dataclass(frozen=True)
class Agreement:
    """How alike two routers are on the same rows."""

    tokens: float  # share of tokens with the same likeliest next token
    adapters: float  # share of tokens and linears with the same strongest adapter
    gates: float  # mean absolute difference of a gate


def ways(mixture: Mixture, arrow: ArrowRouting) -> dict[str, Router | None]:
    """What a trained router is held against."""
    names, device = mixture.stack.names, mixture.device
    alone = {f"adapter {name}": ConstantRouter([float(name == other) for other in names], device) for name in names}
    return {
        "base": None,
        **alone,
        "uniform": ConstantRouter([1 / len(names)] * len(names), device),
        "arrow": InputRouter(arrow),
    }


def chosen_arrow(mixture: Mixture, adapters: Sequence[LoraWeights], rows: Tensor) -> ArrowRouting:
    """Arrow with the top k and temperature that suit these rows best; they are not those it is judged by."""
    count = len(mixture.stack.names)
    plain = ArrowRouting.of(mixture.stack, adapters).to(mixture.device)
    grid = itertools.product(sorted({1, min(2, count), count}), ARROW_TEMPERATURES)
    # With one adapter kept its gate is 1, whatever the temperature.
    tried = [replace(plain, top_k=k, temperature=t) for k, t in grid if k > 1 or t == 1.0]
    return min(tried, key=lambda arrow: perplexity(mixture, InputRouter(arrow), rows))


@torch.no_grad()
def perplexity(mixture: Mixture, router: Router | None, rows: Tensor, mean: dict[str, float] | None = None) -> float:
    """exp of the mean negative log-likelihood of a token of rows `[count, tokens]`; `mean` takes the mean gates."""
    names = mixture.stack.names
    total, count = 0.0, 0
    sums = torch.zeros(len(names), dtype=torch.float64)

    def add(place: int, x: Tensor, gates: Tensor) -> None:
        sums.add_(gates.double().sum((0, 1)).cpu())

    for part in rows.split(ROWS_AT_ONCE):
        ids = part.to(mixture.device)
        logits = mixture.logits(ids, router, add if mean is not None else None)
        total += cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    if mean is not None and router is not None:
        values = sums / (rows.numel() * len(mixture.stack.modules))
        mean.update(zip(names, values.tolist(), strict=True))
    return math.exp(total / count)


def figures(
    mixture: Mixture,
    routers: Mapping[str, Router | None],
    columns: Mapping[str, Tensor],
    told: Callable[[str], None] = lambda name: None,
) -> Figures:
    """Judge each router on each column's rows."""
    found = Figures()
    for name, router in routers.items():
        told(name)
        found.perplexity[name] = {}
        routes = router is not None and not isinstance(router, ConstantRouter)
        for column, rows in columns.items():
            mean: dict[str, float] = {}
            found.perplexity[name][column] = perplexity(mixture, router, rows, mean if routes else None)
            if routes:
                found.gates.setdefault(name, {})[column] = mean
    return found


@torch.no_grad()
def agreement(mixture: Mixture, one: Router, other: Router, rows: Tensor) -> Agreement:
    """How alike two routers are on rows `[count, tokens]`, each in its own run of them."""
    same_token = same_adapter = difference = 0.0
    for row in rows.split(1):
        (first, best), (second, other_best) = (_run(mixture, each, row.to(mixture.device)) for each in (one, other))
        same_token += (best == other_best).float().mean().item()
        same_adapter += (first.argmax(-1) == second.argmax(-1)).float().mean().item()
        difference += (first - second).abs().mean().item()
    count = len(rows)
    return Agreement(same_token / count, same_adapter / count, difference / count)


def _run(mixture: Mixture, router: Router, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The gates `[M, batch, tokens, K]`, 0 for an adapter that lacks the linear, and the likeliest next tokens."""
    gates: list[Tensor] = []

    def keep(place: int, x: Tensor, found: Tensor) -> None:
        gates.append(found.float() * mixture.stack.present(place).to(found.device))

    logits = mixture.logits(ids, router, keep)
    return torch.stack(gates), logits.argmax(-1)
