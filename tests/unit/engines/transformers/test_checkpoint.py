"""What a checkpoint lacks of its model, and what of it has no place: by headers alone, and as it is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_model
from xloom.commands.settings_checks import check_weights
from xloom.engines.transformers.checkpoint import loading_info
from xloom.engines.transformers.model import load_model
from xloom.protocol import XloomError
from xloom.settings import EngineSettings, ModelSettings, Settings

MODELS = [("llama", False), ("qwen2", True), ("gemma3", True), ("phi3", False), ("mixtral", False)]


def change(model: Path, lacks: str = "", **more: torch.Tensor) -> str:
    """Take the last tensor with such a name out of a checkpoint, and put others in; returns its name."""
    file = model / "model.safetensors"
    weights = load_file(file)
    name = next((name for name in sorted(weights, reverse=True) if lacks and lacks in name), "")
    weights.pop(name, None)
    save_file(weights | more, file, {"format": "pt"})
    return name


@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_a_whole_checkpoint_passes_and_a_missing_tensor_is_named(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = tiny_model(tmp_path, architecture, tied=tied)
    settings = Settings(model=ModelSettings(source=str(model)))
    (finding,) = check_weights(settings)
    assert (finding.level, finding.check) == ("ok", "weights")
    lacks = change(model, "self_attn.o_proj.weight")
    (finding,) = check_weights(settings)
    assert finding.level == "fail"
    assert lacks in finding.detail
    assert "[model_not_loadable]" in finding.detail


def test_a_tensor_without_a_place_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tmp_path, "llama")
    change(model, **{"model.layers.0.self_attn.gate.weight": torch.zeros(4)})
    (finding,) = check_weights(Settings(model=ModelSettings(source=str(model))))
    assert finding.level == "warn"
    assert "model.layers.0.self_attn.gate.weight" in finding.detail
    with caplog.at_level(logging.WARNING):
        load_model(ModelSettings(source=str(model)), EngineSettings(dtype="float32"))
    assert "model.layers.0.self_attn.gate.weight" in caplog.text


@pytest.mark.parametrize("lacks", ["k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_the_transformers_backend_refuses_what_it_would_make_up(tmp_path: Path, lacks: str) -> None:
    model = tiny_model(tmp_path, "llama")
    name = change(model, lacks)
    with pytest.raises(XloomError) as caught:
        load_model(ModelSettings(source=str(model)), EngineSettings(dtype="float32"))
    assert caught.value.code == "model_not_loadable"
    assert name in caught.value.message


def test_a_quantised_linear_is_its_weight(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama")
    file = model / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        shape = weights.pop(name).shape
        stem = name.removesuffix(".weight")
        weights[f"{stem}.weight_packed"] = torch.zeros(shape[0], shape[1] // 8, dtype=torch.int32)
        weights[f"{stem}.weight_scale"] = torch.ones(shape[0], shape[1] // 32)
        weights[f"{stem}.weight_shape"] = torch.tensor(shape)
    save_file(weights, file, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    quantisation = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    info = loading_info(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    lacks = change(model, "down_proj.weight_packed")
    assert list(loading_info(model)["missing_keys"]) == [lacks.replace("weight_packed", "weight")]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama")
    change(model, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8)})
    (finding,) = check_weights(Settings(model=ModelSettings(source=str(model))))
    assert finding.level == "fail"
    with pytest.raises(XloomError) as caught:
        load_model(ModelSettings(source=str(model)), EngineSettings(dtype="float32"))
    assert caught.value.code == "model_not_loadable"
