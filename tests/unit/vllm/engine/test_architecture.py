"""The linears that take adapters, found in the model; the same modules of vLLM as a list of Llama's names gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import ARCHITECTURES, tiny_model
from xloom.settings import ModelSettings
from xloom.vllm.engine.architecture import USUAL, target_modules

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIXED = [*ATTENTION, "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
VLLM_LINEARS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # of a layer, in vLLM's eight


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vllm_adapts_the_same_linears_of_each_architecture(architecture: str, tmp_path: Path) -> None:
    from vllm import ModelRegistry
    from vllm.lora.utils import is_in_target_modules

    folder = tiny_model(tmp_path, architecture)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    packed = ModelRegistry.models[name].load_model_cls().packed_modules_mapping
    found = target_modules(ModelSettings(source=str(folder)))
    fixed = ATTENTION if architecture == "mixtral" else FIXED
    linears = VLLM_LINEARS[:2] if architecture == "mixtral" else VLLM_LINEARS
    for linear in linears:
        assert is_in_target_modules(linear, found, packed) == is_in_target_modules(linear, fixed, packed) is True
    for other in ("embed_tokens", "lm_head", "experts", "gate"):
        assert not is_in_target_modules(other, found, packed)


@pytest.mark.parametrize(
    ("kind", "linears"),
    [
        ("phi", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
        ("starcoder2", [*ATTENTION, "c_fc", "c_proj"]),
        ("cohere", [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
        ("granite", [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
        ("olmo2", [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
        ("gemma", [*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
        ("opt", ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]),
        ("olmoe", ATTENTION),
    ],
)
def test_other_architectures_have_their_own_names(kind: str, linears: list[str], tmp_path: Path) -> None:
    written(tmp_path, kind)
    assert sorted(target_modules(ModelSettings(source=str(tmp_path)))) == sorted(linears)


def test_a_model_with_no_text_decoder_of_its_own_gets_the_usual_names(tmp_path: Path) -> None:
    written(tmp_path, "mistral3")
    assert target_modules(ModelSettings(source=str(tmp_path))) == list(USUAL)


def written(folder: Path, kind: str) -> None:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 300}
    AutoConfig.for_model(kind, **({} if kind == "mistral3" else sizes)).save_pretrained(folder)
