"""`arrow`: gates without training, by how much of a linear's input lies along what each adapter answers to most.

Ostapenko et al. 2024, arXiv 2405.11157; as `peft.tuners.lora.arrow` (0.21), which approximates the singular vectors by
15 steps of power iteration from a random vector; here they are exact.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from xloom.mixtures.routing.inputs import InputRouting


class ArrowRouting(InputRouting):
    """softmax over the `top_k` largest of |R x| / temperature, with R the adapters' prototypes."""

    kind: ClassVar[str] = "arrow"
    absolute: ClassVar[bool] = True


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """The top right singular vector `[in]` of B A, float32; A is `[rank, in]`, B `[out, rank]`. 0 where B A is 0.

    Through B's and A's QR factors, so that B A itself is never made.
    """
    q, upper = torch.linalg.qr(a.double().T)  # A^T = Q U, so B A = B U^T Q^T
    _, lower = torch.linalg.qr(b.double())
    _, values, right = torch.linalg.svd(lower @ upper.T)
    vector = q @ right[0] if values[0] > 0 else torch.zeros(a.shape[1])
    return vector.float()
