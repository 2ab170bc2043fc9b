"""A routing without a classifier, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xloom.mixtures.routing import Routing


def routing(modules: Sequence[str], segments: Sequence[Sequence[tuple[int, int]]]) -> Routing:
    """Two adapters over the given modules, stacked as `segments` says."""
    return Routing(
        num_adapters=2,
        adapter_names=("0", "1"),
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
        layers=((torch.zeros(2 * len(modules), 4), None),),
    )
