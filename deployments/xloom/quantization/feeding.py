"""Which layers feed which linears, and no more: found by running a model, so that scales are folded where they cancel.

A scale s per channel cancels when a layer's output is divided by it and the inputs of *all* that read that output are
multiplied by it. Whether a fold names them all shows in the model's own logits. Powers of two are exact in any dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # of the largest logit; what a missed reader changes is of its own size


@dataclass(frozen=True)
class Fold:
    """A layer whose output may be divided by a scale, and the linears behind it, by name."""

    smooth: str
    behind: tuple[str, ...]

    @property
    def kind(self) -> tuple[str, ...]:
        """What it has in common with those of other layers."""
        return (self.smooth.rpartition(".")[2], *sorted({name.rpartition(".")[2] for name in self.behind}))


def norm_folds(model: nn.Module, ids: Tensor, ignored: Collection[str] = ()) -> list[Fold]:
    """The norms of a causal model whose every reader is a linear, with those; `ids [rows, tokens]` are run.

    One that feeds `ignored` linears alone is left out.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}  # by address; the tensor is kept, so that it is given to no other
    behind: dict[str, list[str]] = {}

    def wrote(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[output.data_ptr()] = (name, output)

    def read(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].data_ptr() in outputs:
            norm, output = outputs[inputs[0].data_ptr()]
            if inputs[0].numel() == output.numel():
                behind.setdefault(norm, []).append(name)

    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: read(name, inputs)))
        elif isinstance(weight, Tensor) and weight.ndim == 1:
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: wrote(name, output)))
    try:
        logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    found = [Fold(norm, tuple(dict.fromkeys(names))) for norm, names in behind.items()]
    return cancelling(model, ids, [fold for fold in found if not set(fold.behind) <= set(ignored)])


@torch.no_grad()
def cancelling(model: nn.Module, ids: Tensor, folds: Sequence[Fold]) -> list[Fold]:
    """Those of the folds that leave the model as it is. Tried kind by kind, and one by one where a kind fails."""
    plain = logits(model, ids)
    by_kind: dict[tuple[str, ...], list[Fold]] = {}
    for fold in folds:
        by_kind.setdefault(fold.kind, []).append(fold)
    kept: set[Fold] = set()
    for alike in by_kind.values():
        if _same(plain, _folded_logits(model, ids, alike)):
            kept.update(alike)
        elif len(alike) > 1:
            kept.update(fold for fold in alike if _same(plain, _folded_logits(model, ids, [fold])))
    return [fold for fold in folds if fold in kept]


def _same(plain: Tensor, folded: Tensor) -> bool:
    return bool((plain - folded).abs().max() <= TOLERANCE * plain.abs().max())  # False for NaN


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """A causal model's logits of `ids [rows, tokens]`, in float32."""
    device = next(model.parameters()).device
    found: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return found.float()


def _folded_logits(model: nn.Module, ids: Tensor, folds: Sequence[Fold]) -> Tensor:
    """The logits with every fold's output divided, and its linears' inputs multiplied, by 1/4 to 4."""
    generator = torch.Generator().manual_seed(0)
    handles = []
    try:
        for fold in folds:
            width = model.get_parameter(f"{fold.behind[0]}.weight").shape[1]
            scale = 2.0 ** torch.randint(-2, 3, (width,), generator=generator)

            def divide(_: Any, __: Any, output: Any, scale: Tensor = scale) -> Any:
                divided = output.clone()  # of a fused projection AWQ scales the last rows
                divided[..., -len(scale) :] /= scale.to(output)
                return divided

            def multiply(_: Any, inputs: tuple[Any, ...], scale: Tensor = scale) -> Any:
                return (inputs[0] * scale.to(inputs[0]), *inputs[1:])

            handles.append(model.get_submodule(fold.smooth).register_forward_hook(divide))
            handles += [model.get_submodule(name).register_forward_pre_hook(multiply) for name in fold.behind]
        return logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
