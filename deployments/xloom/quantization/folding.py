"""Adapters on a base whose linears no longer see the inputs, or give the outputs, that the adapters were trained with.

SmoothQuant and AWQ divide what a norm (or v_proj, or up_proj) puts out by a scale per channel, and multiply the weights
behind it by the same: the model is the same, its parts are not. With s_in, s_out the scales of one linear,

    x' = x / s_in,    W' = diag(1 / s_out) W diag(s_in),    y' = y / s_out

so the adapter B A x, which the next layer expects divided by s_out, is (diag(1 / s_out) B) (A diag(s_in)) x'. A gate
between A and B changes nothing of that, so it holds for mixtures too; the R of gates made of R x is as A is.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from xloom.mixtures.options import ROUTER_FILE
from xloom.mixtures.targets import PREFIX

# Beside the quantised weights, in a folder of its own: vLLM takes every safetensors file next to them for weights.
FOLDING_FILE = "xloom/folding.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"

_R = ".router.weight"  # the end of its name in a router's file

Folding = Mapping[str, torch.Tensor]


def read_folding(model: Path) -> Folding | None:
    """A quantised folder's scales, in float32: `<module>.input` `[in]`, `<module>.output` `[out]`; None without."""
    file = model / FOLDING_FILE
    return dict(load_file(file)) if file.is_file() else None


def rescale(prepared: Path, out: Path, folding: Folding) -> Path:
    """Write a prepared adapter or bundle to `out`, its A and B rescaled for the folded base, in float32."""
    out.mkdir(parents=True, exist_ok=True)
    for entry in prepared.iterdir():
        if entry.is_file() and entry.name != ADAPTER_FILE:
            shutil.copyfile(entry, out / entry.name)
    rescaled = {}
    with safe_open(prepared / ADAPTER_FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            rescaled[key] = _rescaled(key, file.get_tensor(key), folding)
    save_file(rescaled, out / ADAPTER_FILE, metadata={"format": "pt"})
    routers = load_file(prepared / ROUTER_FILE) if (prepared / ROUTER_FILE).is_file() else {}
    if any(key.endswith(_R) for key in routers):
        routers = {key: _with_input(key, tensor, folding) for key, tensor in routers.items()}
        save_file(routers, out / ROUTER_FILE, metadata={"format": "pt"})
    return out


def _with_input(key: str, tensor: torch.Tensor, folding: Folding) -> torch.Tensor:
    """R `[K, in]` of a linear reads what A reads. X-LoRA's classifier has none, and reads nothing that is folded."""
    scale = folding.get(f"{key.removesuffix(_R)}.input")
    return tensor if scale is None or not key.endswith(_R) else tensor.float() * scale[None, :]


def _rescaled(key: str, tensor: torch.Tensor, folding: Folding) -> torch.Tensor:
    name = key.removeprefix(PREFIX)
    if name.endswith(".lora_A.weight"):
        scale = folding.get(f"{name.removesuffix('.lora_A.weight')}.input")
        return tensor if scale is None else tensor.float() * scale[None, :]
    scale = folding.get(f"{name.removesuffix('.lora_B.weight')}.output")
    return tensor if scale is None else tensor.float() / scale[:, None]
