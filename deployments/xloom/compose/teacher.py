"""An X-LoRA bundle as a teacher: its adapters, its own gates, and what form a linear router for them has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from xloom.compose.learned import LinearRouter
from xloom.compose.router import BundleRouter
from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.bundle import Bundle, read_bundle
from xloom.mixtures.hooks import Adapter
from xloom.mixtures.lora import LoraWeights
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.mixtures.stacking import ANY_RANK, Shapes, Stack
from xloom.protocol import XloomError


@dataclass(frozen=True)
class Teacher:
    """A bundle that is learned from."""

    bundle: Bundle
    routing: XLoraRouting

    @classmethod
    def read(cls, folder: Path, modules: Shapes, hidden_size: int, root: Path | None, base: BaseWeights) -> Teacher:
        """Read a bundle. Raises `XloomError`: not_distillable, and as `prepare_bundle` does."""
        bundle = read_bundle(folder, root, modules, base)
        with TemporaryDirectory(prefix="xloom-") as scratch:
            prepare_bundle(
                folder, modules, Path(scratch), hidden_size=hidden_size, max_rank=ANY_RANK, root=root, base=base
            )
            routing = Adapter.load(Path(scratch)).routing
        assert routing is not None
        options = bundle.options
        why = None
        if options.mixing_mode == "concatenate" and bundle.projection is not None:
            why = "it has a learned projection, which its adapters alone don't make up for"
        elif not options.enable_softmax and options.mixing_mode != "gated":
            why = "its gates are logits without softmax"
        elif not 0 < options.global_scaling_weight <= 1:
            why = f"its global_scaling_weight is {options.global_scaling_weight}: gates beyond 1"
        if why:
            message = f"{folder} can't be learned from: {why}."
            raise XloomError("not_distillable", message, "Train a router from its adapters and text: --adapters.")
        if len(set(bundle.adapter_names)) != len(bundle.adapter_names):
            message = f"{folder} has two adapters of one name: {', '.join(bundle.adapter_names)}."
            raise XloomError("broken_bundle", message, "Rename one of their folders.")
        return cls(bundle, routing)

    @property
    def adapters(self) -> dict[str, LoraWeights]:
        """The bundle's adapters by name, in the order of its columns."""
        return dict(zip(self.bundle.adapter_names, self.bundle.adapters, strict=True))

    def router(self, device: torch.device) -> BundleRouter:
        """The bundle's own gates."""
        return BundleRouter(self.routing.to(device), self.bundle.options.global_scaling_weight)

    def student(self, stack: Stack, temperature: float = 1.0) -> LinearRouter:
        """A linear router that can give such gates.

        A softmax over the adapters that a linear has adds up to 1; where the bundle's gates don't, each has a sigmoid.
        """
        options = self.bundle.options
        adds_up = stack.even and options.enable_softmax and options.mixing_mode != "gated" and options.top_k is None
        adds_up = adds_up and not options.enable_softmax_topk and options.global_scaling_weight == 1
        activation = "softmax" if adds_up else "sigmoid"
        return LinearRouter(stack, activation=activation, temperature=temperature, top_k=options.top_k)
