"""Writes the prepared folders that replicas load: a plain adapter, or a bundle stacked into one adapter.

The format is described in docs/x-lora.md. The same source gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.bundle import Bundle, read_bundle
from xloom.mixtures.lora import LoraWeights, read_lora
from xloom.mixtures.options import MIXING_MODES, PASSES, PREFILLS, XLORA_FILE, RoutingOptions
from xloom.mixtures.overflow import check_range, largest_gate
from xloom.mixtures.targets import PREFIX
from xloom.protocol import NO_OVERRIDES, Overrides, XloomError

Shapes = Mapping[str, tuple[int, int]]
Segments = list[list[tuple[int, int]]]
Stacked = dict[str, tuple[torch.Tensor, torch.Tensor]]

ROUTER_FILE = "xlora_router.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds: its largest rank, the kinds of module it adapts, its size in bytes."""

    rank: int
    targets: tuple[str, ...]  # last parts of the module names, sorted
    size: int


def prepare_lora(
    folder: Path, modules: Shapes, out: Path, *, max_rank: int, base: BaseWeights | None = None
) -> Prepared:
    """Check a LoRA folder against the base model's `modules` and write it to `out`, normalised.

    `base` is what tensors of the base model that ride along are compared with; without it they are refused.
    Raises `XloomError` as `read_lora` and `LoraWeights.check` do.
    """
    weights = read_lora(folder, modules, base)
    weights.check(modules, max_rank)
    config = {
        "r": weights.r,
        "lora_alpha": _plain_number(weights.alpha),
        "use_rslora": weights.use_rslora,
        "rank_pattern": dict(weights.rank_pattern),
        "alpha_pattern": {key: _plain_number(value) for key, value in weights.alpha_pattern.items()},
    }
    _write_adapter(out, config, dict(weights.tensors))
    return Prepared(weights.max_rank, _kinds(weights.tensors), _folder_size(out))


def prepare_bundle(
    folder: Path,
    modules: Shapes,
    out: Path,
    *,
    hidden_size: int,
    max_rank: int,
    overrides: Overrides = NO_OVERRIDES,
    root: Path | None = None,
    base: BaseWeights | None = None,
) -> Prepared:
    """Check a bundle against the base model, stack its adapters along the rank and write it to `out`.

    Raises `XloomError`: broken_bundle, invalid_override, unsupported_target, wrong_base, wrong_shape, rank_too_large,
    and what reading raises.
    """
    bundle = read_bundle(folder, root, modules, base)
    for adapter in bundle.adapters:
        adapter.check(modules, max_rank)
        if "lm_head" in adapter.tensors:
            message = f"{adapter.folder} adapts lm_head, which an X-LoRA bundle can't."
            raise XloomError("unsupported_target", message, "Adapt the attention and MLP projections.")
    options = _override(bundle, overrides)
    targeted = [name for name in modules if any(name in adapter.tensors for adapter in bundle.adapters)]
    _check_classifier(bundle, hidden_size, len(targeted))
    segments: Segments = [
        [(k, adapter.rank(name)) for k, adapter in enumerate(bundle.adapters) if name in adapter.tensors]
        for name in targeted
    ]
    ranks = [sum(rank for _, rank in segment) for segment in segments]
    if max(ranks) > max_rank:
        raise XloomError(
            "rank_too_large",
            f"{folder}: the ranks of its {len(bundle.adapters)} adapters add up to {max(ranks)}; "
            f"the limit is {max_rank}.",
            "Raise store.max_rank (at most 512), or use fewer adapters or adapters of lower rank.",
        )
    gate = largest_gate(folder, [(layer.weight, layer.bias) for layer in bundle.classifier], options)
    stacked = _stack(bundle, options, targeted)
    check_range(folder, "broken_bundle", {name: (a, b, 1.0) for name, (a, b) in stacked.items()}, gate)
    patterns = {name: rank for name, rank in zip(targeted, ranks, strict=True) if rank != max(ranks)}
    config = {
        "r": max(ranks),
        "lora_alpha": max(ranks),
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
    }
    _write_adapter(out, config, stacked)
    routing = dataclasses.asdict(options)
    del routing["global_scaling_weight"]  # it is in B
    description = {
        "format": FORMAT,
        "num_adapters": len(bundle.adapters),
        "adapter_names": list(bundle.adapter_names),
        "modules": targeted,
        "segments": segments,
        "routing": routing | {"hidden_size": hidden_size},
    }
    _write_json(out / XLORA_FILE, description)
    router = {}
    for number, linear in enumerate(bundle.classifier):
        router[f"layers.{number}.weight"] = linear.weight.contiguous()
        if linear.bias is not None:
            router[f"layers.{number}.bias"] = linear.bias.contiguous()
    save_file(router, out / ROUTER_FILE, metadata={"format": "pt"})
    return Prepared(max(ranks), _kinds(stacked), _folder_size(out))


def _override(bundle: Bundle, overrides: Overrides) -> RoutingOptions:
    given = {name: value for name, value in msgspec.structs.asdict(overrides).items() if value is not None}
    for name, allowed in {"mixing_mode": MIXING_MODES, "routing_passes": PASSES, "prefill": PREFILLS}.items():
        if name in given and given[name] not in allowed:
            message = f"{name} {given[name]!r} is none of {', '.join(map(str, allowed))}."
            raise XloomError("invalid_override", message, "Mend the setting.")
    options = dataclasses.replace(bundle.options, **given)
    if "prefill" in given and options.routing_passes == 2:
        message = f"prefill {options.prefill} would have no effect: the scaling pass runs for every token."
        raise XloomError("invalid_override", message, "Leave prefill out, or set routing_passes to 1.")
    top_k, temperature = overrides.top_k, overrides.temperature
    count = len(bundle.adapters)
    if options.top_k is not None and not 1 <= options.top_k <= count:
        code = "broken_bundle" if top_k is None else "invalid_override"
        message = f"{bundle.folder}: top_k is {options.top_k}, but the bundle has {count} adapters."
        raise XloomError(code, message, f"Choose top_k from 1 to {count}.")
    if temperature is not None:
        if not temperature > 0:
            raise XloomError("invalid_override", f"temperature is {temperature}.", "It must be above 0.")
        if not options.enable_softmax and options.mixing_mode != "gated" and temperature != bundle.options.temperature:
            raise XloomError(
                "invalid_override",
                f"temperature {temperature} would have no effect: {bundle.folder} is without softmax.",
                "Leave temperature out, or choose mixing_mode gated.",
            )
    return options


def _check_classifier(bundle: Bundle, hidden_size: int, num_modules: int) -> None:
    width = bundle.classifier[0].weight.shape[1]
    if bundle.hidden_size != hidden_size or width != hidden_size:
        raise XloomError(
            "broken_bundle",
            f"{bundle.folder}: the classifier is made for a hidden size of {width} (its configuration says "
            f"{bundle.hidden_size}); the base model has {hidden_size}.",
            "Use a bundle trained on this base model.",
        )
    outputs, count = bundle.classifier[-1].weight.shape[0], len(bundle.adapters)
    expected = count * num_modules if bundle.options.layerwise_scalings else count
    if outputs != expected:
        product = f"{count} adapters x {num_modules} modules" if bundle.options.layerwise_scalings else "its adapters"
        raise XloomError(
            "broken_bundle",
            f"{bundle.folder}: the classifier has {outputs} outputs, but {product} need {expected}.",
            "Check that the adapters and layerwise_scalings are those the classifier was trained with.",
        )


def _stack(bundle: Bundle, options: RoutingOptions, targeted: list[str]) -> Stacked:
    holders: dict[str, list[LoraWeights]] = {
        name: [adapter for adapter in bundle.adapters if name in adapter.tensors] for name in targeted
    }
    sources = [tensor.dtype for adapter in bundle.adapters for pair in adapter.tensors.values() for tensor in pair]
    projection = bundle.projection if options.mixing_mode == "concatenate" else None
    if projection is not None:
        _check_projection(bundle, projection, holders)
        sources += [tensor.dtype for tensor in projection.values()]
    dtype = reduce(torch.promote_types, sources)
    stacked = {}
    for name, adapters in holders.items():
        a = torch.cat([adapter.tensors[name][0].to(dtype) for adapter in adapters])
        if projection is not None:
            b = projection[name].to(dtype)
        else:
            scaled = [
                adapter.tensors[name][1].float() * (adapter.scale(name) * options.global_scaling_weight)
                for adapter in adapters
            ]
            b = torch.cat(scaled, dim=1)
            narrow = b.to(dtype)
            # A scale that is no power of two would have B rounded a second time: it then stays in float32.
            b = narrow if torch.equal(narrow.float(), b) else b
        stacked[name] = (a, b)
    return stacked


def _check_projection(
    bundle: Bundle, projection: Mapping[str, torch.Tensor], holders: Mapping[str, list[LoraWeights]]
) -> None:
    if set(projection) != set(holders):
        odd = sorted(set(projection) ^ set(holders))
        message = f"{bundle.folder}: the projection and the adapters differ in {', '.join(odd[:3])}."
        raise XloomError("broken_bundle", message, "A learned projection needs one weight for each adapted module.")
    for name, adapters in holders.items():
        expected = (adapters[0].tensors[name][1].shape[0], sum(adapter.rank(name) for adapter in adapters))
        if tuple(projection[name].shape) != expected:
            message = (
                f"{bundle.folder}: the projection of {name} is {list(projection[name].shape)}, not {list(expected)}."
            )
            raise XloomError("broken_bundle", message, "Its shape is [out, sum of the adapters' ranks].")


def _write_adapter(out: Path, scaling: Mapping[str, Any], tensors: Stacked) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": sorted(tensors)}
    _write_json(out / "adapter_config.json", config | dict(scaling))
    named = {}
    for name, (a, b) in tensors.items():
        named[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        named[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _plain_number(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _kinds(names: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))


def _folder_size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
