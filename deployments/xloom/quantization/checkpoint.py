"""Compressed-tensors checkpoints in plain torch: their sizes, and their weights as floats again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

PACKED, SCALE, ZERO_POINT, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
PARTS = (PACKED, SCALE, ZERO_POINT, SHAPE)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model."""
    return sorted(folder.glob("*.safetensors"))


def stored_bytes(folder: Path, linears: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the named linears, and of all weights, in a plain or quantised checkpoint."""
    ours, total = 0, 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(key)
                size = tensor.numel() * tensor.element_size()
                total += size
                module, _, part = key.rpartition(".")
                if module in linears and (part == "weight" or part in PARTS):
                    ours += size
    return ours, total


def unpack(packed: Tensor, shape: tuple[int, int], bits: int = 4) -> Tensor:
    """Integers `shape` from int32 words along the rows, lowest first, each stored with half its range added."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    values = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)[: shape[0], : shape[1]] - (1 << (bits - 1))


def dequantise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's state with every quantised weight as float32 `[out, in]`."""
    state = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part == PACKED:
            rows, columns = (int(size) for size in tensors[f"{module}.{SHAPE}"])
            values = unpack(tensor, (rows, columns))
            zero = tensors.get(f"{module}.{ZERO_POINT}")
            state[f"{module}.weight"] = _scaled(values, tensors[f"{module}.{SCALE}"], zero)
        elif part == "weight" and f"{module}.{SCALE}" in tensors:
            state[key] = _scaled(tensor, tensors[f"{module}.{SCALE}"], None)
        elif part not in PARTS:
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
    return state


def _scaled(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """(values - zero) * scale, with `scale [out, groups]`; zero points are packed along the rows."""
    rows, columns = values.shape
    groups = scale.shape[1]
    grouped = values.reshape(rows, groups, columns // groups).float()
    if zero is not None:
        grouped = grouped - unpack(zero.t().contiguous(), (groups, rows)).t().float()[:, :, None]
    return (grouped * scale.float()[:, :, None]).reshape(rows, columns)


def load_dequantised(folder: Path, *, activations: bool = True) -> nn.Module:
    """A quantised folder as a transformers model in float32; with `activations`, those are rounded as the scheme says.

    Slow, and what tests and perplexities are computed with.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= load_file(file)
    config = AutoConfig.from_pretrained(folder)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = model.load_state_dict(dequantise(tensors), strict=False).missing_keys
    if any(not key.startswith("lm_head") for key in missing):
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    model.tie_weights()
    model.eval()
    if activations and quantised is not None and rounds_activations(folder):
        for name, module in model.named_modules():
            if f"{name}.{SCALE}" in tensors:
                module.forward = partial(_rounded_linear, module)  # hooks still see the input as it was
    loaded: nn.Module = model
    return loaded


def rounds_activations(folder: Path) -> bool:
    """Whether the folder's scheme rounds activations to 8 bits."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups = config.get("quantization_config", {}).get("config_groups", {})
    return any(group.get("input_activations") for group in groups.values())


def round_tokens(x: Tensor) -> Tensor:
    """Round `x [..., in]` to 127 steps of each token's largest value, as the int8 kernels do."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def _rounded_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(round_tokens(x), module.weight, module.bias)
