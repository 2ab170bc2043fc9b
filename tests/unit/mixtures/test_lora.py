from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_adapter
from xloom.mixtures.lora import read_lora
from xloom.protocol import XloomError

Q_PROJ = "model.layers.0.self_attn.q_proj"
Shapes = dict[str, tuple[int, int]]


@pytest.fixture
def adapter(tmp_path: Path, llama: Path) -> Path:
    return tiny_adapter(tmp_path / "adapter", llama, rank=4, alpha=6)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refusal(folder: Path) -> XloomError:
    with pytest.raises(XloomError) as raised:
        read_lora(folder)
    assert raised.value.cure
    assert raised.value.status == 400
    return raised.value


def test_an_adapter_is_read_with_its_modules_ranks_and_scales(adapter: Path) -> None:
    weights = read_lora(adapter)
    assert len(weights.tensors) == 14
    assert weights.rank(Q_PROJ) == weights.max_rank == 4
    assert weights.scale(Q_PROJ) == 6 / 4


def test_rslora_divides_by_the_square_root_of_the_rank(adapter: Path) -> None:
    change_config(adapter, use_rslora=True)
    assert read_lora(adapter).scale(Q_PROJ) == 6 / 2


def test_patterns_override_alpha_and_rank_by_module(adapter: Path) -> None:
    change_config(adapter, r=9, rank_pattern={".*proj": 4}, alpha_pattern={"layers.0.self_attn.q_proj": 20})
    weights = read_lora(adapter)
    assert weights.scale(Q_PROJ) == 20 / 4
    assert weights.scale("model.layers.1.self_attn.q_proj") == 6 / 4


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|k)_proj", ["nothing"], None])
def test_targets_are_taken_from_the_tensors_present(adapter: Path, targets: Any) -> None:
    change_config(adapter, target_modules=targets)
    assert len(read_lora(adapter).tensors) == 14


def test_keys_with_an_adapters_name_are_read(adapter: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    change_tensors(adapter, rename)
    assert Q_PROJ in read_lora(adapter).tensors


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 1]]}, "replication"),
        ({"peft_type": "LOHA"}, "LOHA"),
    ],
)
def test_features_that_cant_be_served_are_named(adapter: Path, changes: dict[str, Any], word: str) -> None:
    change_config(adapter, **changes)
    error = refusal(adapter)
    assert error.code == "unsupported_adapter"
    assert word in error.message


def test_dora_is_found_in_the_tensors_too(adapter: Path) -> None:
    key = f"base_model.model.{Q_PROJ}.lora_magnitude_vector.weight"
    change_tensors(adapter, lambda tensors: tensors.update({key: torch.ones(128)}))
    assert refusal(adapter).code == "unsupported_adapter"


def test_tensors_that_are_not_lora_are_refused(adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    error = refusal(adapter)
    assert error.code == "unsupported_adapter"
    assert "lm_head" in error.message


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_are_refused_unopened(adapter: Path, name: str) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(b"\x80\x04.")
    error = refusal(adapter)
    assert error.code == "pickle_refused"
    assert name in error.message


def test_a_pickle_under_the_safetensors_name_is_refused(adapter: Path) -> None:
    torch.save({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    assert refusal(adapter).code == "broken_adapter"


@pytest.mark.parametrize("key", ["model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_A.weight"])
def test_embeddings_are_no_target(adapter: Path, key: str) -> None:
    change_tensors(adapter, lambda tensors: tensors.update({f"base_model.model.{key}": torch.ones(2, 2)}))
    error = refusal(adapter)
    assert error.code == "unsupported_target"
    assert "embed_tokens" in error.message


def test_experts_are_no_target(adapter: Path) -> None:
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({key: torch.ones(2, 2)}))
    error = refusal(adapter)
    assert error.code == "unsupported_target"
    assert "experts" in error.message


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    error = refusal(adapter)
    assert error.code == "broken_adapter"
    assert file in error.message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"r": "x", "lora_alpha": 1}', '{"r": 4, "lora_alpha": null}'])
def test_a_configuration_that_is_none_is_refused(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert refusal(adapter).code == "broken_adapter"


def break_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"]


def break_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"] = torch.ones(128, 3)


def break_rank_of_both(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"] = torch.ones(3, 64)
    tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"] = torch.ones(128, 3)


def break_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"][0, 0] = float("nan")


def break_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"] = torch.ones(4, 64, dtype=torch.int8)


@pytest.mark.parametrize("change", [break_b, break_rank, break_rank_of_both, break_value, break_dtype])
def test_broken_tensors_are_refused_by_name(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    change_tensors(adapter, change)
    error = refusal(adapter)
    assert error.code == "broken_adapter"
    assert Q_PROJ in error.message


def test_an_adapter_without_tensors_is_refused(adapter: Path) -> None:
    change_tensors(adapter, dict.clear)
    assert refusal(adapter).code == "broken_adapter"


def test_the_right_adapter_passes_the_check(adapter: Path, shapes: Shapes) -> None:
    read_lora(adapter).check(shapes, max_rank=4)


@pytest.mark.parametrize(
    ("code", "changed", "max_rank"),
    [
        ("rank_too_large", {}, 3),
        ("wrong_shape", {Q_PROJ: (128, 32)}, 4),
        ("wrong_shape", {Q_PROJ: (96, 64)}, 4),
        ("wrong_base", {Q_PROJ: None}, 4),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    adapter: Path, shapes: Shapes, code: str, changed: dict[str, tuple[int, int] | None], max_rank: int
) -> None:
    others = {name: shape for name, shape in (shapes | changed).items() if shape is not None}
    with pytest.raises(XloomError) as raised:
        read_lora(adapter).check(others, max_rank)
    assert raised.value.code == code
    assert changed == {} or Q_PROJ in raised.value.message
