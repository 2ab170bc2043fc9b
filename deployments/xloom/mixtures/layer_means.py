"""Which layer a linear is of, and gates as means over each layer's linears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_of(name: str) -> int:
    """The number in a linear's name: that of its layer; 0 without one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


def layer_means(modules: Sequence[str]) -> Tensor:
    """`[num_layers, M]`, which makes gates `[M, K]` into means over each layer's linears; NaN where it has none."""
    layers = [layer_of(name) for name in modules]
    matrix = torch.zeros(max(layers) + 1, len(layers))
    matrix[layers, range(len(layers))] = 1
    return matrix / matrix.sum(1, keepdim=True)
