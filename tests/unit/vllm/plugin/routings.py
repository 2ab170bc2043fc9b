"""A routing without a classifier, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xloom.mixtures.routing.xlora import XLoraRouting


def routing(
    modules: Sequence[str], segments: Sequence[Sequence[tuple[int, int]]], num_adapters: int = 2
) -> XLoraRouting:
    """Adapters over the given modules, stacked as `segments` says."""
    return XLoraRouting(
        num_adapters=num_adapters,
        adapter_names=tuple(map(str, range(num_adapters))),
        modules=tuple(modules),
        segments=tuple(tuple(parts) for parts in segments),
        hidden_size=4,
        layerwise_scalings=True,
        mixing_mode="additive",
        enable_softmax=True,
        temperature=1.0,
        top_k=None,
        enable_softmax_topk=False,
        scaling_pass_value=0.0,
        layers=((torch.zeros(num_adapters * len(modules), 4), None),),
    )
