"""The linears that take adapters, found in the model; the same modules of vLLM as a list of Llama's names gave."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.models import ARCHITECTURES, tiny_model
from xloom.protocol import XloomError
from xloom.settings import ModelSettings
from xloom.vllm.engine.architecture import USUAL, check_experts, check_mixtures, target_modules

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


def of_kind(architecture: str, **kind: Any) -> Any:
    """A resolved configuration, as far as it tells the kind of a model; its class comes from vLLM's own registry."""
    from vllm import ModelRegistry

    plain = dict.fromkeys(
        [
            "is_encoder_decoder",
            "is_multimodal_model",
            "is_diffusion",
            "is_hybrid",
            "has_inner_state",
            "is_attention_free",
        ],
        False,
    )
    registry = SimpleNamespace(
        resolve_model_cls=lambda names, model: (ModelRegistry.models[names[0]].load_model_cls(), names[0])
    )
    model = {"runner_type": "generate", "architectures": [architecture], "registry": registry, **plain, **kind}
    return SimpleNamespace(model_config=SimpleNamespace(**model))


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "PhiForCausalLM", "Starcoder2ForCausalLM", "CohereForCausalLM", "GraniteForCausalLM",
     "Olmo2ForCausalLM", "GemmaForCausalLM"],
)  # fmt: skip
def test_whatever_takes_lora_in_vllm_may_serve_mixtures(architecture: str) -> None:
    check_mixtures(of_kind(architecture))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({"runner_type": "pooling"}, "does not generate text"),
        ({"is_encoder_decoder": True}, "encoder and a decoder"),
        ({"is_multimodal_model": True}, "takes more than text"),
        ({"is_diffusion": True}, "once each, in order"),
        ({"is_hybrid": True}, "keeps a state"),
        ({"has_inner_state": True}, "keeps a state"),
        ({"is_attention_free": True}, "keeps a state"),
    ],
)
def test_models_that_can_have_no_scaling_sequence_are_refused(kind: dict[str, Any], why: str) -> None:
    with pytest.raises(XloomError, match=why) as raised:
        check_mixtures(of_kind("LlamaForCausalLM", **kind))
    assert raised.value.code == "unsupported_architecture"
    assert "LlamaForCausalLM" in raised.value.message


def test_models_that_take_no_lora_in_vllm_are_refused() -> None:
    with pytest.raises(XloomError, match="GPT2LMHeadModel: it takes no LoRA") as raised:
        check_mixtures(of_kind("GPT2LMHeadModel"))
    assert raised.value.code == "unsupported_architecture"


def test_experts_with_adapters_are_refused_on_cpu_by_name() -> None:
    config = of_kind("MixtralForCausalLM", is_moe=True)
    config.lora_config = object()
    with pytest.raises(XloomError, match="MixtralForCausalLM is a mixture of experts") as raised:
        check_experts(config, "cpu")
    assert raised.value.code == "unsupported_architecture"
    check_experts(config, "cuda")
    config.model_config.is_moe = False
    check_experts(config, "cpu")


def written(folder: Path, kind: str) -> None:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": 300}
    AutoConfig.for_model(kind, **({} if kind == "mistral3" else sizes)).save_pretrained(folder)
