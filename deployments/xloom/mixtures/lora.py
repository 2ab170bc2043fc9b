"""LoRA folders in PEFT's format: read, checked, and nothing in them trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.files import read_json, read_tensors
from xloom.mixtures.overflow import check_range
from xloom.mixtures.targets import base_name, check_targets, plain_name, possible_names
from xloom.protocol import XloomError

Value = TypeVar("Value")

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
# Features of peft.LoraConfig (0.21) that change the forward pass in ways a plain A and B can't express.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA bias",
    "modules_to_save": "modules_to_save",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "trainable_token_indices": "trained token embeddings",
    "arrow_config": "Arrow routing",
    "target_parameters": "LoRA on parameters",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
_CLASSIFIER = "internal_xlora_classifier."
# As vllm.lora.peft_helper.PEFTHelper._init_is_supported (0.32): these only set the initial adapter weights; the others
# (PiSSA, OLoRA, CorDA, LoftQ) change the base model's weights too.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA adapter: per module A `[rank, in]` and B `[out, rank]`, and what scales them."""

    folder: Path
    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # module -> (A, B), by name

    def rank(self, module: str) -> int:
        """The rank of one module's A and B."""
        return self.tensors[module][0].shape[0]

    @property
    def max_rank(self) -> int:
        """The largest rank over the modules."""
        return max(self.rank(module) for module in self.tensors)

    def scale(self, module: str) -> float:
        """What multiplies B A x: alpha / r, or alpha / sqrt(r) for rsLoRA (peft.tuners.lora.layer.LoraLayer)."""
        alpha = match_pattern(self.alpha_pattern, module)
        alpha = self.alpha if alpha is None else alpha
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def check(self, modules: Mapping[str, tuple[int, int]], max_rank: int) -> None:
        """Hold the adapter against a base model's linear modules.

        Raises `XloomError`: unsupported_target, wrong_base, wrong_shape, rank_too_large, broken_adapter (it overflows).
        """
        for module, (a, b) in self.tensors.items():
            if module not in modules:
                raise XloomError(
                    "wrong_base",
                    f"{self.folder} adapts {module}, which the base model does not have.",
                    "Use an adapter trained on this base model.",
                )
            out_features, in_features = modules[module]
            if a.shape[1] != in_features or b.shape[0] != out_features:
                raise XloomError(
                    "wrong_shape",
                    f"{self.folder}: {module} is {out_features} x {in_features} in the base model, but the adapter's "
                    f"B A is {b.shape[0]} x {a.shape[1]}.",
                    "Use an adapter trained on this base model.",
                )
        if self.max_rank > max_rank:
            raise XloomError(
                "rank_too_large",
                f"{self.folder} has rank {self.max_rank}; the limit is {max_rank}.",
                "Raise store.max_rank (at most 512), or use an adapter of lower rank.",
            )
        scaled = {module: (a, b, self.scale(module)) for module, (a, b) in self.tensors.items()}
        check_range(self.folder, "broken_adapter", scaled)


def match_pattern(pattern: Mapping[str, Value], module: str) -> Value | None:
    """The value of the first pattern that names `module` (peft.utils.get_pattern_key)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return None


def _refuse_features(folder: Path, config: Mapping[str, Any]) -> None:
    features = [name for key, name in _UNSUPPORTED.items() if config.get(key)]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        features.append(f"init_lora_weights={init!r}, which changes the base model's weights")
    if config.get("bias", "none") != "none":
        features.append(f"bias={config['bias']!r}")
    if features:
        message = f"{folder} uses {', '.join(features)}, which xloom can't serve."
        raise XloomError("unsupported_adapter", message, "Convert it to a plain LoRA adapter.")


def _refuse_target(folder: Path, module: str) -> None:
    reason = ""
    if ".experts" in f".{module}":
        reason = "LoRA on fused experts is not supported; adapt the attention projections"
    elif "embed" in module.rsplit(".", 1)[-1]:
        reason = "LoRA on embeddings is not supported; adapt linear layers"
    if reason:
        raise XloomError("unsupported_target", f"{folder} adapts {module}.", f"{reason[0].upper()}{reason[1:]}.")


def _pair_up(
    folder: Path, tensors: Mapping[str, torch.Tensor], modules: Collection[str], base: BaseWeights | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by module, under the base model's names where `modules` knows them."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if "lora_magnitude_vector" in key:
            message = f"{folder} uses DoRA ({key}), which xloom can't serve."
            raise XloomError("unsupported_adapter", message, "Convert it to a plain LoRA adapter.")
        if not tensor.numel() or (tensor.dim() == 1 and (".lora_A" in key or ".lora_B" in key)):
            raise XloomError(
                "broken_adapter",
                f"{folder}: {key} has shape {list(tensor.shape)}: a shard, or nothing, of DeepSpeed ZeRO-3 or FSDP.",
                "Gather the weights before save_pretrained: deepspeed.zero.GatheredParameters, or FSDP's "
                "summon_full_params.",
            )
        name = plain_name(key)
        if "lora_embedding_" in key:
            _refuse_target(folder, name.split(".lora_embedding_")[0])
        match = _KEY.fullmatch(name)
        if match is None:
            _check_rider(folder, key, tensor, base)
            continue
        module = base_name(match["module"], modules)
        _refuse_target(folder, module)
        if tensor.dim() != 2:
            message = f"{folder}: {key} has {tensor.dim()} dimensions; LoRA on a linear layer has 2."
            raise XloomError("unsupported_target", message, "Adapt linear layers only.")
        if match["part"] in parts.setdefault(module, {}):
            message = f"{folder} holds lora_{match['part']} of {module} twice, under names that mean the same."
            raise XloomError("broken_adapter", message, "Save one adapter alone.")
        parts[module][match["part"]] = tensor
    pairs = {}
    for module in sorted(parts):
        pair = parts[module]
        if set(pair) != {"A", "B"}:
            message = f"{folder}: {module} has lora_{''.join(pair)} alone."
            raise XloomError("broken_adapter", message, "Save the adapter anew.")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            message = f"{folder}: {module}: A has rank {pair['A'].shape[0]}, B has rank {pair['B'].shape[1]}."
            raise XloomError("broken_adapter", message, "Save the adapter anew.")
        pairs[module] = (pair["A"], pair["B"])
    return pairs


def _check_rider(folder: Path, key: str, tensor: torch.Tensor, base: BaseWeights | None) -> None:
    """A tensor that is not LoRA may be the base model's own: PEFT saves its embeddings after a resize, say."""
    name = plain_name(key).replace(".base_layer.", ".")
    known = ((short, base.read(short)) for short in possible_names(name)) if base is not None else ()
    name, original = next((found for found in known if found[1] is not None), (name, None))
    if original is not None and original.shape == tensor.shape and torch.equal(original.to(tensor.dtype), tensor):
        return
    if original is None:
        message = f"{folder}: the tensor {key} is not the A or B of a LoRA module, and not known of the base model."
        raise XloomError("unsupported_adapter", message, "Save the LoRA weights alone, in PEFT's format.")
    rows = "" if original.shape == tensor.shape else f" {list(tensor.shape)} in place of {list(original.shape)}"
    message = f"{folder} changes the base model's own {name}{rows}: it was trained, or resized, beside the LoRA."
    cure = "Merge it into the base model, or train LoRA on linear layers alone (save_embedding_layers=False)."
    raise XloomError("unsupported_adapter", message, cure)


def read_lora(
    folder: Path, modules: Collection[str] = (), base: BaseWeights | None = None, *, in_bundle: bool = False
) -> LoraWeights:
    """Read a PEFT LoRA folder (`adapter_config.json`, `adapter_model.safetensors`).

    With the base model's linear `modules`, tensors are named as they are there and held against `target_modules` (a
    list, a regular expression or "all-linear"); without, what is adapted is what the file holds. Tensors of the base
    model itself are passed over where they equal those of `base`; `in_bundle` passes over the classifier's, which PEFT
    saves with each adapter. Raises `XloomError`: broken_adapter, pickle_refused, unsupported_adapter,
    unsupported_target.
    """
    config = read_json(folder / "adapter_config.json", "broken_adapter")
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        message = f"{folder} is a {kind} adapter, not LoRA."
        raise XloomError("unsupported_adapter", message, "Give a LoRA adapter, or list an X-LoRA bundle under xlora.")
    _refuse_features(folder, config)
    tensors = read_tensors(folder / "adapter_model.safetensors", "broken_adapter")
    if in_bundle:
        tensors = {key: tensor for key, tensor in tensors.items() if _CLASSIFIER not in key}
    try:
        weights = LoraWeights(
            folder=folder,
            r=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            use_rslora=bool(config.get("use_rslora", False)),
            rank_pattern={str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
            tensors=_pair_up(folder, tensors, modules, base),
        )
        for module in weights.tensors:
            expected = match_pattern(weights.rank_pattern, module) or weights.r
            if weights.rank(module) != expected:
                message = f"{folder}: {module} has rank {weights.rank(module)}; the configuration says {expected}."
                raise XloomError("broken_adapter", message, "Save the adapter anew.")
            if not math.isfinite(weights.scale(module)):
                message = f"{folder}: the scale of {module} is {weights.scale(module)}."
                raise XloomError("broken_adapter", message, "Check lora_alpha and alpha_pattern.")
        if modules and weights.tensors:
            check_targets(folder, config, weights.tensors, modules)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        message = f"{folder / 'adapter_config.json'} is not a LoRA configuration: {error!r}."
        raise XloomError("broken_adapter", message, "Save the adapter anew.") from None
    if not weights.tensors:
        raise XloomError("broken_adapter", f"{folder} holds no LoRA tensors.", "Save the adapter anew.")
    return weights
