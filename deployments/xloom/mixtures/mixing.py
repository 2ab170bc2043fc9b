"""The arithmetic of mixing: one LoRA delta with a gate between A and B. All three mixing modes are this formula.

`additive` and `concatenate` differ in B (the scaled B_k side by side, or a learned projection), `gated` in where the
gates come from; see docs/x-lora.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_gates(gates: Tensor, segment: Sequence[tuple[int, int]]) -> Tensor:
    """Repeat adapter gates `[..., K]` over the stacked ranks of one module: `[..., R]`, R the sum of its ranks."""
    columns = [adapter for adapter, rank in segment for _ in range(rank)]
    return gates[..., torch.tensor(columns, device=gates.device)]


def gated_delta(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """B (g * A x) for x `[..., in]`, A `[R, in]`, B `[out, R]`, gates `[..., R]`: `[..., out]`."""
    return ((x @ a.T) * gates) @ b.T
