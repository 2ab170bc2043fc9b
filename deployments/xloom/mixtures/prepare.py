"""Writes the prepared folders that replicas load: a plain adapter, or a bundle stacked into one adapter.

The format is described in docs/x-lora.md. The same source gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.bundle import Bundle, read_bundle
from xloom.mixtures.lora import LoraWeights, read_lora
from xloom.mixtures.options import MIXING_MODES, PASSES, PREFILLS, ROUTER_FILE, RoutingOptions
from xloom.mixtures.overflow import check_range, largest_gate
from xloom.mixtures.stacking import Prepared, Shapes, check_adapters, stacked, write_adapter, write_mixture
from xloom.protocol import NO_OVERRIDES, Overrides, XloomError


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
    write_adapter(out, config, weights.tensors)
    return Prepared.of(out, weights.max_rank, weights.tensors)


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
    check_adapters(bundle.adapters, modules, max_rank)
    options = _override(bundle, overrides)
    targeted = [name for name in modules if any(name in adapter.tensors for adapter in bundle.adapters)]
    _check_classifier(bundle, hidden_size, len(targeted))
    projection = bundle.projection if options.mixing_mode == "concatenate" else None
    if projection is not None:
        holders = {name: [each for each in bundle.adapters if name in each.tensors] for name in targeted}
        _check_projection(bundle, projection, holders)
    stack = stacked(
        folder,
        bundle.adapter_names,
        bundle.adapters,
        modules,
        max_rank=max_rank,
        factor=options.global_scaling_weight,
        projection=projection,
    )
    gate = largest_gate(folder, [(layer.weight, layer.bias) for layer in bundle.classifier], options)
    check_range(folder, "broken_bundle", {name: (a, b, 1.0) for name, (a, b) in stack.tensors.items()}, gate)
    routing = dataclasses.asdict(options)
    del routing["global_scaling_weight"]  # it is in B
    write_mixture(out, stack, routing | {"hidden_size": hidden_size})
    router = {}
    for number, linear in enumerate(bundle.classifier):
        router[f"layers.{number}.weight"] = linear.weight.contiguous()
        if linear.bias is not None:
            router[f"layers.{number}.bias"] = linear.bias.contiguous()
    save_file(router, out / ROUTER_FILE, metadata={"format": "pt"})
    return Prepared.of(out, stack.rank, stack.tensors)


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


def _plain_number(value: float) -> float | int:
    return int(value) if value.is_integer() else value
