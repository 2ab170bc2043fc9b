"""Adapters side by side on one base model: for each linear A and B stacked along the rank, ready to be gated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xloom.mixtures.lora import LoraWeights
from xloom.protocol import XloomError

Shapes = Mapping[str, tuple[int, int]]  # linear -> (out, in), in the model's order


@dataclass(frozen=True)
class StackedLinear:
    """One linear that K adapters adapt: A `[R, in]`, B `[out, R]` with the adapters' scales in it."""

    name: str
    a: Tensor
    b: Tensor
    columns: Tensor  # [R]: the adapter of each rank
    present: Tensor  # [K], bool: the adapters that have this linear


@dataclass(frozen=True)
class Stack:
    """K adapters over the M linears that any of them adapts, in the model's order (PEFT's for X-LoRA)."""

    names: tuple[str, ...]
    linears: tuple[StackedLinear, ...]
    rank: int  # the largest sum of ranks

    @classmethod
    def of(
        cls,
        adapters: Mapping[str, LoraWeights],
        modules: Shapes,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Stack:
        """Stack adapters of any ranks, scales and targets.

        Raises `XloomError`: wrong_base, wrong_shape, broken_adapter, unsupported_target (lm_head).
        """
        for weights in adapters.values():
            weights.check(modules, max_rank=max(weights.max_rank, 1))
            if "lm_head" in weights.tensors:
                message = f"{weights.folder} adapts lm_head, which a mixture can't."
                raise XloomError("unsupported_target", message, "Adapt the attention and MLP projections.")
        linears = []
        for name in modules:
            held = [(k, weights) for k, weights in enumerate(adapters.values()) if name in weights.tensors]
            if not held:
                continue
            a = torch.cat([weights.tensors[name][0].float() for _, weights in held])
            b = torch.cat([weights.tensors[name][1].float() * weights.scale(name) for _, weights in held], dim=1)
            columns = [k for k, weights in held for _ in range(weights.rank(name))]
            present = torch.zeros(len(adapters), dtype=torch.bool)
            present[[k for k, _ in held]] = True
            linears.append(
                StackedLinear(
                    name, a.to(device, dtype), b.to(device, dtype), torch.tensor(columns, device=device),
                    present.to(device),
                )
            )  # fmt: skip
        return cls(tuple(adapters), tuple(linears), max(len(linear.columns) for linear in linears))

    @property
    def even(self) -> bool:
        """Whether every adapter has every linear."""
        return all(bool(linear.present.all()) for linear in self.linears)
