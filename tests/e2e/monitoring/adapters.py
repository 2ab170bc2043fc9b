"""Adapters for the sample, of any rank, that nobody has seen before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN = 256  # of the sample's base model
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, rank: int) -> Path:
    """A LoRA adapter of one module, in PEFT's format; each rank has weights of its own."""
    folder.mkdir()
    written = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    }
    (folder / "adapter_config.json").write_text(json.dumps(written))
    rng = np.random.default_rng(rank)
    shapes = {f"{MODULE}.lora_A.weight": (rank, HIDDEN), f"{MODULE}.lora_B.weight": (HIDDEN, rank)}
    weights = {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder
