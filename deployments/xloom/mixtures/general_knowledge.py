"""General knowledge subtracted: what several adapters have in common with those of a general kind is taken from them.

As `peft.tuners.lora.arrow.ArrowLoraLinearLayer.gen_know_sub` (0.21), after "forgetting via negation" (arXiv
2212.04089): the mean of the general adapters' A is taken from an adapter's A, and that of their B from its B. Its
scale stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from xloom.mixtures.lora import LoraWeights
from xloom.protocol import XloomError


def without_general(name: str, adapter: LoraWeights, general: Mapping[str, LoraWeights]) -> LoraWeights:
    """The adapter without what is general, in float32. Raises `XloomError` (invalid_mixture) where ranks differ."""
    tensors = {}
    for module, (a, b) in adapter.tensors.items():
        for other, weights in general.items():
            rank = weights.rank(module) if module in weights.tensors else 0
            if rank != a.shape[0]:
                raise XloomError(
                    "invalid_mixture",
                    f"{other!r} can't be taken from {name!r}: at {module} its rank is {rank}, not {a.shape[0]}.",
                    "Subtract adapters of the same rank and targets alone.",
                )
        pairs = [each.tensors[module] for each in general.values()]
        mean_a = torch.stack([each.float() for each, _ in pairs]).mean(0)
        mean_b = torch.stack([each.float() for _, each in pairs]).mean(0)
        tensors[module] = (a.float() - mean_a, b.float() - mean_b)
    return dataclasses.replace(adapter, tensors=tensors)
