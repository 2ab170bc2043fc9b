"""`arrow`: gates without training, by how much of a linear's input lies along what each adapter answers to most.

Ostapenko et al. 2024, arXiv 2405.11157; as `peft.tuners.lora.arrow` (0.21), which approximates the singular vectors by
15 steps of power iteration from a random vector; here they are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from xloom.mixtures.lora import LoraWeights
from xloom.mixtures.routing.inputs import InputRouting, with_absent
from xloom.mixtures.stacking import Stack


class ArrowRouting(InputRouting):
    """softmax over the `top_k` largest of |R x| / temperature, with R the adapters' prototypes."""

    kind: ClassVar[str] = "arrow"
    absolute: ClassVar[bool] = True

    @classmethod
    def of(
        cls, stack: Stack, adapters: Sequence[LoraWeights], top_k: int | None = None, temperature: float = 1
    ) -> Self:
        """The routing of a stack of these adapters."""
        return cls(
            **stack.described,
            activation="softmax",
            top_k=top_k,
            temperature=temperature,
            routers=prototypes(stack, adapters),
        )


def prototypes(stack: Stack, adapters: Sequence[LoraWeights]) -> tuple[tuple[Tensor, Tensor], ...]:
    """For each module R `[K, in]`, the adapters' top right singular vectors, their scales left out, and b: 0."""
    found = []
    for name, segment in zip(stack.modules, stack.segments, strict=True):
        weight = torch.zeros(len(adapters), stack.tensors[name][0].shape[1])
        for adapter, _ in segment:
            weight[adapter] = prototype(*adapters[adapter].tensors[name])
        found.append((weight, with_absent(torch.zeros(len(adapters)), segment)))
    return tuple(found)


def prototype(a: Tensor, b: Tensor) -> Tensor:
    """The top right singular vector `[in]` of B A, float32; A is `[rank, in]`, B `[out, rank]`. 0 where B A is 0.

    Through B's and A's QR factors, so that B A itself is never made.
    """
    q, upper = torch.linalg.qr(a.double().T)  # A^T = Q U, so B A = B U^T Q^T
    _, lower = torch.linalg.qr(b.double())
    _, values, right = torch.linalg.svd(lower @ upper.T)
    vector = q @ right[0] if values[0] > 0 else torch.zeros(a.shape[1])
    return vector.float()
