"""Models and adapters of random weights, for measurements in which only shapes count."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

EXPERTS, RANK = 4, 16
Shape = dict[str, int]
LARGE: Shape = {  # about 200 M parameters: its forward pass is most of a step on two cores
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SEVEN_B: Shape = {  # Mistral 7B's
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


def write_model(folder: Path, shape: Shape) -> Path:
    """A Mistral configuration; vLLM fills in random weights (`load_format: dummy`)."""
    folder.mkdir()
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
    }
    (folder / "config.json").write_text(json.dumps(config | shape))
    return folder


def write_adapter(folder: Path, linears: dict[str, tuple[int, int]], rank: int) -> Path:
    """A random adapter on all of the decoder's linears."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (out, width) in linears.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width) / width**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return folder


def write_bundle(folder: Path, linears: dict[str, tuple[int, int]], hidden: int) -> Path:
    """A random X-LoRA bundle with gates for each linear."""
    for number in range(EXPERTS):
        write_adapter(folder / str(number), linears, RANK)
    outputs = EXPERTS * len(linears)
    key = "base_model.internal_xlora_classifier.layers.0"
    tensors = {f"{key}.weight": torch.randn(outputs, hidden) / hidden**0.5, f"{key}.bias": torch.randn(outputs)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": hidden, "xlora_depth": 1,
        "adapters": {str(number): str(number) for number in range(EXPERTS)}, "layerwise_scalings": True,
        "enable_softmax": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
