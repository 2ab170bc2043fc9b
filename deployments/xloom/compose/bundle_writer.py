"""Writes what was trained as a folder of its own: the router, and beside it the adapters that it was trained with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xloom.compose.learned import ClassifierRouter, LearnedRouter, LinearRouter
from xloom.mixtures.linear_router import LinearRouter as SavedRouter
from xloom.mixtures.linear_router import save_linear_router

_CLASSIFIER = "base_model.internal_xlora_classifier."
_ADAPTER_FILES = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json")


def copy_adapters(adapters: Mapping[str, Path], out: Path) -> dict[str, str]:
    """Copy each adapter's own files to `out/<name>`; the paths are relative to `out`."""
    for name, folder in adapters.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for pattern in _ADAPTER_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, out / name / file.name)
    return {name: name for name in adapters}


def write_router(out: Path, router: LearnedRouter, adapters: Mapping[str, str], base: str) -> None:
    """Write a trained router whose adapters lie at these paths, relative to `out`. Raises `OSError`."""
    if isinstance(router, LinearRouter):
        layers = {
            name: tuple(tensor.detach().cpu() for tensor in router.folded(place))
            for place, name in enumerate(router.names)
        }
        saved = SavedRouter(adapters, layers, router.activation, router.top_k, router.temperature)  # type: ignore[arg-type]
        save_linear_router(out, saved)
    elif isinstance(router, ClassifierRouter):
        write_xlora(out, router, list(adapters.values()), base)


def write_xlora(out: Path, router: ClassifierRouter, adapters: Sequence[str], base: str) -> None:
    """Write PEFT's X-LoRA folder, complete: the columns' adapters by number, at their paths.

    PEFT's own `save_pretrained` (0.20, 0.21) drops classifier tensors whose layer number equals an adapter's name. Its
    dropout layers are left out (`xlora_dropout_p` 0), so its layers are numbered 0, 2, 4…
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, (weight, bias) in enumerate(router.folded()):
        tensors[f"{_CLASSIFIER}layers.{2 * number}.weight"] = weight.detach().cpu().contiguous()
        tensors[f"{_CLASSIFIER}layers.{2 * number}.bias"] = bias.detach().cpu().contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = xlora_fields(router) | {
        "base_model_name_or_path": base,
        "adapters": {str(number): path for number, path in enumerate(adapters)},
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def xlora_fields(router: ClassifierRouter) -> dict[str, Any]:
    """The fields of peft.XLoraConfig (0.21) for a classifier."""
    first = router.layers[0]
    return {
        "auto_mapping": None,
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "global_scaling_weight": 1.0,
        "hidden_size": first.in_features,
        "inference_mode": False,
        "layerwise_scalings": router.layerwise,
        "peft_type": "XLORA",
        "revision": None,
        "scaling_pass_value": 0.0,
        "softmax_temperature": router.temperature,
        "task_type": "CAUSAL_LM",
        "top_k_lora": None,
        "use_trainable_adapters": False,
        "xlora_depth": len(router.layers),
        "xlora_dropout_p": 0.0,
        "xlora_size": first.out_features if len(router.layers) > 1 else 2048,
    }
