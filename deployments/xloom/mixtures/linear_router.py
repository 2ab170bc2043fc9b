"""Learned linear routers as they are on disk: for each linear a weight and a bias on its own input.

A folder with `router_config.json` and `router.safetensors`; the format is described in docs/mixtures.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xloom.mixtures.files import read_json, read_tensors
from xloom.protocol import XloomError

CONFIG_FILE = "router_config.json"
TENSORS_FILE = "router.safetensors"
ACTIVATIONS = ("softmax", "sigmoid")
_SAVE_ANEW = "Save it with save_linear_router."


@dataclass(frozen=True)
class LinearRouter:
    """K adapters, and for each linear how the logits of its own input x are made: R x + b.

    `gates = softmax(logits / temperature)` over the `top_k` largest, or `sigmoid(logits / temperature)` of them; the
    others are 0. None keeps all. An adapter that lacks a linear has no logit there: its row of R and of b is not read.
    """

    adapters: Mapping[str, str]  # name -> folder, absolute or relative to the router's, in the order of R's rows
    layers: Mapping[str, tuple[Tensor, Tensor]]  # linear, by its Hugging Face name -> R [K, in], b [K]
    activation: str = "softmax"
    top_k: int | None = None
    temperature: float = 1.0

    def check(self) -> None:
        """Raises `XloomError` (broken_bundle): an option or a shape is wrong."""
        if not self.adapters:
            raise _broken("names no adapters")
        if self.activation not in ACTIVATIONS:
            raise _broken(f"has activation {self.activation!r}, which is none of {', '.join(ACTIVATIONS)}")
        count = len(self.adapters)
        if self.top_k is not None and not 1 <= self.top_k <= count:
            raise _broken(f"has top_k {self.top_k} for {count} adapters")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise _broken(f"has temperature {self.temperature}; it must be above 0")
        if not self.layers:
            raise _broken("has no weights")
        for name, (weight, bias) in self.layers.items():
            if weight.dim() != 2 or len(weight) != count or tuple(bias.shape) != (count,):
                shapes = f"{list(weight.shape)} and {list(bias.shape)}"
                raise _broken(f"has weight and bias {shapes} at {name}, not [{count}, in] and [{count}]")


def is_linear_router(folder: Path) -> bool:
    """Whether a folder is one."""
    return (folder / CONFIG_FILE).is_file()


def save_linear_router(folder: Path, router: LinearRouter) -> None:
    """Write a router; an existing one of the folder is replaced file by file. Raises `XloomError` (broken_bundle)."""
    router.check()
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "kind": "linear",
        "adapters": dict(router.adapters),
        "activation": router.activation,
        "top_k": router.top_k,
        "temperature": router.temperature,
    }
    tensors = {}
    for name, (weight, bias) in router.layers.items():
        tensors[f"{name}.router.weight"] = weight.detach().float().cpu().contiguous()
        tensors[f"{name}.router.bias"] = bias.detach().float().cpu().contiguous()
    scratch = folder / f"{TENSORS_FILE}.tmp"
    save_file(tensors, scratch, metadata={"format": "pt"})
    os.replace(scratch, folder / TENSORS_FILE)
    scratch = folder / f"{CONFIG_FILE}.tmp"
    scratch.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / CONFIG_FILE)


def load_linear_router(folder: Path) -> LinearRouter:
    """Read a router, its tensors in float32 on the CPU. Raises `XloomError`: broken_bundle, pickle_refused."""
    config = read_json(folder / CONFIG_FILE, "broken_bundle")
    tensors = read_tensors(folder / TENSORS_FILE, "broken_bundle")
    try:
        router = _from(config, tensors)
        router.check()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise XloomError("broken_bundle", f"{folder}: the router is broken: {error!r}.", _SAVE_ANEW) from None
    except XloomError as error:
        raise XloomError(error.code, f"{folder}: {error.message}", error.cure) from None
    return router


def _from(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LinearRouter:
    if config["kind"] != "linear":
        raise ValueError(f"kind {config['kind']!r}, not 'linear'")
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".router.")
        if not name or part not in ("weight", "bias"):
            raise ValueError(f"a tensor {key!r}")
        (weights if part == "weight" else biases)[name] = tensor.float()
    if odd := sorted(weights.keys() ^ biases.keys()):
        raise ValueError(f"{odd[0]} has a weight or a bias alone")
    top_k = config.get("top_k")
    return LinearRouter(
        adapters={str(name): str(path) for name, path in config["adapters"].items()},
        layers={name: (weights[name], biases[name]) for name in sorted(weights)},
        activation=str(config.get("activation", "softmax")),
        top_k=None if top_k is None else int(top_k),
        temperature=float(config.get("temperature", 1.0)),
    )


def _broken(what: str) -> XloomError:
    return XloomError("broken_bundle", f"The router {what}.", _SAVE_ANEW)
