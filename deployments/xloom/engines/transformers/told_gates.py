"""The gates of one request, until they leave with its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from xloom.mixtures.layer_means import layer_means
from xloom.mixtures.routing.base import Routing
from xloom.protocol import Gates


class ToldGates:
    """Of a mixture's request: the sum over its prompt's rows, each counted once, and its last row."""

    def __init__(self, routing: Routing, prompt_tokens: int, *, layers: bool) -> None:
        self._routing, self._prompt_tokens = routing, prompt_tokens
        self._layers = layer_means(routing.modules) if layers else None
        self._counted = 0  # rows of the prompt; its last token makes the answer's first
        self._sums = torch.zeros(routing.num_adapters, dtype=torch.float64)
        self._told = False
        self._last: Tensor | None = None  # [M, K]

    def add(self, start: int, gates: Tensor) -> None:
        """The gates `[num_tokens, M, K]` of the tokens from `start` on were made."""
        first, end = max(start, self._counted), min(start + len(gates), self._prompt_tokens - 1)
        if end > first:
            rows = gates[first - start : end - start].mean(1)
            self._sums += rows.sum(0).cpu().double()
            self._counted = end
        self._last = gates[-1].cpu()

    def take(self) -> Gates | None:
        """What goes with the token that is sampled of the last row."""
        if self._last is None:
            return None
        told = Gates(_bytes(self._last.mean(0)))
        if self._layers is not None:
            told.layers = _bytes(self._layers @ self._last.float())
        if not self._told:
            self._told = True
            told.adapters, told.prompt_tokens = list(self._routing.adapter_names), self._counted
            told.prompt = _bytes(self._sums / self._counted) if self._counted else b""
        return told


def _bytes(values: Tensor) -> bytes:
    return values.float().numpy().astype("<f4").tobytes()
