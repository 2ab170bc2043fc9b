"""Adapters stacked along the rank into one, as every kind of mixture has them, and the folder that replicas load.

The adapters may differ in rank, scale and targets; one that lacks a module has rank 0 there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xloom.mixtures.lora import LoraWeights
from xloom.mixtures.options import FORMAT, XLORA_FILE
from xloom.mixtures.targets import PREFIX
from xloom.protocol import XloomError

ANY_RANK = 1 << 20  # no limit

Shapes = Mapping[str, tuple[int, int]]
Tensors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds: its largest rank, the kinds of module it adapts, its size in bytes."""

    rank: int
    targets: tuple[str, ...]  # last parts of the module names, sorted
    size: int

    @classmethod
    def of(cls, out: Path, rank: int, modules: Mapping[str, Any]) -> Prepared:
        """A folder just written."""
        targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in modules}))
        return cls(rank, targets, sum(entry.stat().st_size for entry in out.iterdir() if entry.is_file()))


@dataclass(frozen=True)
class Stack:
    """K adapters as one: A `[R, in]` and B `[out, R]` of each module, the adapters' scales in B."""

    names: tuple[str, ...]  # of the adapters
    modules: tuple[str, ...]  # that any of them adapts, in the base model's order
    segments: tuple[tuple[tuple[int, int], ...], ...]  # per module: (adapter, rank)
    tensors: Tensors

    @property
    def described(self) -> dict[str, Any]:
        """The fields that the `Routing` of any kind takes of it."""
        return {
            "num_adapters": len(self.names),
            "adapter_names": self.names,
            "modules": self.modules,
            "segments": self.segments,
        }

    @property
    def rank(self) -> int:
        """The largest sum of ranks over the modules."""
        return max(sum(rank for _, rank in segment) for segment in self.segments)

    @property
    def even(self) -> bool:
        """Whether every adapter has every module."""
        return all(len(segment) == len(self.names) for segment in self.segments)

    def present(self, module: int) -> torch.Tensor:
        """Which adapters have a module: `[K]`, bool."""
        found = torch.zeros(len(self.names), dtype=torch.bool)
        found[[adapter for adapter, _ in self.segments[module]]] = True
        return found


def stack_adapters(adapters: Mapping[str, LoraWeights], modules: Shapes) -> Stack:
    """Stack adapters by name, of any ranks. Raises `XloomError` as `check_adapters` does."""
    weights = list(adapters.values())
    check_adapters(weights, modules, ANY_RANK)
    return stacked("the mixture", list(adapters), weights, modules, max_rank=ANY_RANK)


def check_adapters(adapters: Sequence[LoraWeights], modules: Shapes, max_rank: int) -> None:
    """Hold a mixture's adapters against the base model's modules. Raises `XloomError` as `LoraWeights.check` does."""
    for adapter in adapters:
        adapter.check(modules, max_rank)
        if "lm_head" in adapter.tensors:
            message = f"{adapter.folder} adapts lm_head, which a mixture can't."
            raise XloomError("unsupported_target", message, "Adapt the attention and MLP projections.")


def stacked(
    mixture: str | Path,
    names: Sequence[str],
    adapters: Sequence[LoraWeights],
    modules: Shapes,
    *,
    max_rank: int,
    factor: float = 1.0,
    projection: Mapping[str, torch.Tensor] | None = None,
) -> Stack:
    """Stack adapters that `check_adapters` has seen; `factor` multiplies all, a `projection` takes the place of B.

    Raises `XloomError` (rank_too_large).
    """
    targeted = tuple(name for name in modules if any(name in adapter.tensors for adapter in adapters))
    segments = tuple(
        tuple((k, adapter.rank(name)) for k, adapter in enumerate(adapters) if name in adapter.tensors)
        for name in targeted
    )
    rank = max(sum(each for _, each in segment) for segment in segments)
    if rank > max_rank:
        raise XloomError(
            "rank_too_large",
            f"{mixture}: the ranks of its {len(adapters)} adapters add up to {rank}; the limit is {max_rank}.",
            "Raise store.max_rank (at most 512), or use fewer adapters or adapters of lower rank.",
        )
    sources = [tensor.dtype for adapter in adapters for pair in adapter.tensors.values() for tensor in pair]
    sources += [tensor.dtype for tensor in (projection or {}).values()]
    dtype = reduce(torch.promote_types, sources)
    tensors = {}
    for name in targeted:
        holders = [adapter for adapter in adapters if name in adapter.tensors]
        a = torch.cat([adapter.tensors[name][0].to(dtype) for adapter in holders])
        if projection is not None:
            b = projection[name].to(dtype)
        else:
            b = torch.cat([each.tensors[name][1].float() * (each.scale(name) * factor) for each in holders], dim=1)
            narrow = b.to(dtype)
            # A scale that is no power of two would have B rounded a second time: it then stays in float32.
            b = narrow if torch.equal(narrow.float(), b) else b
        tensors[name] = (a, b)
    return Stack(tuple(names), targeted, segments, tensors)


def write_mixture(out: Path, stack: Stack, options: Mapping[str, Any], kind: str | None = None) -> None:
    """Write a stack as the adapter it is loaded as, and beside it how it is routed; `kind` None is X-LoRA's."""
    ranks = {name: sum(rank for _, rank in parts) for name, parts in zip(stack.modules, stack.segments, strict=True)}
    patterns = {name: rank for name, rank in ranks.items() if rank != stack.rank}
    config = {
        "r": stack.rank,
        "lora_alpha": stack.rank,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
    }
    write_adapter(out, config, stack.tensors)
    description = {
        "format": FORMAT,
        "num_adapters": len(stack.names),
        "adapter_names": list(stack.names),
        "modules": list(stack.modules),
        "segments": [list(map(list, segment)) for segment in stack.segments],
        "routing": dict(options),
    }
    write_json(out / XLORA_FILE, description if kind is None else description | {"kind": kind})


def write_adapter(out: Path, scaling: Mapping[str, Any], tensors: Tensors) -> None:
    """Write an adapter in PEFT's format; `scaling` are the fields that say its ranks and scales."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": sorted(tensors)}
    write_json(out / "adapter_config.json", config | dict(scaling))
    named = {}
    for name, (a, b) in tensors.items():
        named[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        named[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """The same data gives the same bytes."""
    file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
