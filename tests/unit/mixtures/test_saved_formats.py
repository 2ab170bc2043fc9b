"""Adapters and bundles as people have them: what PEFT and the xlora package save, and what gets lost or added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import peft_xlora, tiny_adapter, tiny_bundle
from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.bundle import read_bundle
from xloom.mixtures.lora import read_lora
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.protocol import XloomError

Shapes = dict[str, tuple[int, int]]
TWO: tuple[dict[str, Any], ...] = ({"rank": 2, "targets": ("q_proj",)}, {"rank": 3, "targets": ("q_proj",)})
V_PROJ = "model.layers.1.self_attn.v_proj"


def change_config(folder: Path, name: str = "adapter_config.json", **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def ranks(bundle: Path, **options: Any) -> list[int]:
    return [adapter.max_rank for adapter in read_bundle(bundle, **options).adapters]


def refused_bundle(bundle: Path, shapes: Shapes, base: Path) -> XloomError:
    with pytest.raises(XloomError) as raised:
        prepare_bundle(
            bundle, shapes, bundle / "out", hidden_size=64, max_rank=64, base=BaseWeights(str(base)), root=bundle.parent
        )
    return raised.value


def refused_adapter(adapter: Path, shapes: Shapes, base: Path) -> XloomError:
    with pytest.raises(XloomError) as raised:
        prepare_lora(adapter, shapes, adapter / "out", max_rank=64, base=BaseWeights(str(base)))
    return raised.value


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    """What PEFT (0.21) saves of a bundle, with the classifier's file put right, which PEFT cuts too."""
    bundle = tiny_bundle(tmp_path / "trained", llama, adapters=TWO)
    peft_xlora(llama, bundle).save_pretrained(tmp_path / "saved")
    shutil.copy(bundle / "adapter_model.safetensors", tmp_path / "saved")
    return tmp_path / "saved"


def test_what_peft_saves_is_read_from_the_paths_that_peft_reads(saved: Path, llama: Path, shapes: Shapes) -> None:
    read = read_bundle(saved, modules=shapes, base=BaseWeights(str(llama)))
    assert [adapter.folder.parent.name for adapter in read.adapters] == ["trained", "trained"]
    assert all(len(adapter.tensors) == 2 for adapter in read.adapters)


def test_sub_folders_that_peft_damaged_are_refused_with_a_cure(saved: Path, llama: Path, shapes: Shapes) -> None:
    shutil.rmtree(saved.parent / "trained")
    error = refused_bundle(saved, shapes, llama)
    assert "layers.1.self_attn.q_proj" in error.message
    assert "in place of the bundle's own sub-folders" in error.cure


def test_adapters_trained_with_the_classifier_are_those_saved_with_it(saved: Path, llama: Path, shapes: Shapes) -> None:
    change_config(saved, use_trainable_adapters=True)
    assert "PEFT" in refused_bundle(saved, shapes, llama).cure
    for number in "01":  # whole sub-folders, with the tensors of the base model that PEFT adds
        file = saved / number / "adapter_model.safetensors"
        own = load_file(llama / "model.safetensors")
        extra = {f"base_model.lora_model.model.{name}": own[name] for name in ("lm_head.weight", "model.norm.weight")}
        save_file(load_file(saved.parent / "trained" / number / file.name) | extra, file)
    read = read_bundle(saved, modules=shapes, base=BaseWeights(str(llama)))
    assert [adapter.folder.parent.name for adapter in read.adapters] == ["saved", "saved"]


def test_a_list_of_adapters_is_in_the_order_of_the_columns(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=TWO)
    change_config(bundle, adapters=["1", "0"])
    assert ranks(bundle) == [3, 2]
    package = tiny_bundle(tmp_path / "package", llama, adapters=TWO, fmt="xlora")
    change_config(package, "xlora_config.json", adapters={"1": "1", "0": "0"})
    assert ranks(package) == [3, 2]


def test_an_order_that_peft_shuffles_is_refused(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=[*TWO, {"rank": 4, "targets": ("q_proj",)}])
    change_config(bundle, adapters={"1": "1", "0": "0", "2": "2"})
    assert ranks(bundle) == [2, 3, 4]  # as PEFT has it
    change_config(bundle, adapters={"2": "2", "0": "0", "1": "1"})
    with pytest.raises(XloomError, match="PEFT shuffles"):
        read_bundle(bundle)


@pytest.mark.parametrize("adapters", [None, {}, "left out"])
@pytest.mark.parametrize("place", [".", "adapters"])
def test_the_xlora_packages_counted_folders_are_found(llama: Path, tmp_path: Path, adapters: Any, place: str) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=TWO, fmt="xlora")
    for number in range(2):
        shutil.move(bundle / str(number), bundle / place / f"adapter_{number + 1}")
    config = json.loads((bundle / "xlora_config.json").read_text()) | {"adapters": adapters}
    if adapters == "left out":
        del config["adapters"]
    (bundle / "xlora_config.json").write_text(json.dumps(config))
    assert ranks(bundle) == [2, 3]
    (bundle / place / "adapter_2").rename(bundle / place / "law")
    with pytest.raises(XloomError, match="in which order"):
        read_bundle(bundle)


def test_a_classifier_that_lost_a_middle_layer_is_refused(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=TWO, depth=3)
    tensors = load_file(bundle / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.3." not in k}, bundle / "adapter_model.safetensors")
    with pytest.raises(XloomError, match="holds 0, 6, and its depth is 3"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_temperature": 1e-40},
        {"global_scaling_weight": 1e30},
        {"scaling_pass_value": 1e30},
        {"softmax_temperature": float("nan")},
        {"global_scaling_weight": float("inf")},
        {"top_k_lora": float("inf")},
    ],
)
def test_a_bundle_that_overflows_is_refused(
    llama: Path, tmp_path: Path, shapes: Shapes, changes: dict[str, Any]
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=TWO)
    change_config(bundle, **changes)
    assert refused_bundle(bundle, shapes, llama).code == "broken_bundle"


@pytest.mark.parametrize("alpha", [1e30, -1e30, 1e39, 10**400, float("nan"), float("inf")])
def test_an_adapter_that_overflows_is_refused(llama: Path, tmp_path: Path, shapes: Shapes, alpha: float) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama, rank=4)
    change_config(adapter, lora_alpha=alpha)
    assert refused_adapter(adapter, shapes, llama).code == "broken_adapter"
    change_config(adapter, lora_alpha=8, alpha_pattern={V_PROJ: alpha})
    assert refused_adapter(adapter, shapes, llama).code == "broken_adapter"


def test_a_layer_that_the_file_lost_is_named(llama: Path, tmp_path: Path, shapes: Shapes) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "layers.1.self_attn.v" not in k}, adapter / "adapter_model.safetensors"
    )
    error = refused_adapter(adapter, shapes, llama)
    assert error.code == "broken_adapter"
    assert f"lacks {V_PROJ}" in error.message


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "o_proj"], ["q_proj", "wte"], ["q_proj"], "nothing", "("])
def test_targets_and_tensors_have_to_agree(llama: Path, tmp_path: Path, shapes: Shapes, targets: Any) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama, targets=("q_proj", "v_proj"))
    prepare_lora(adapter, shapes, tmp_path / "out", max_rank=64)
    change_config(adapter, target_modules=targets)
    assert refused_adapter(adapter, shapes, llama).code == "broken_adapter"


def test_shards_of_zero_3_are_named_for_what_they_are(llama: Path, tmp_path: Path, shapes: Shapes) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: torch.empty(0) for key in tensors}, adapter / "adapter_model.safetensors")
    assert "ZeRO-3" in refused_adapter(adapter, shapes, llama).message


def test_shards_make_a_whole(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    keys = sorted(tensors)
    for number, name in enumerate(names):
        save_file({key: tensors[key] for key in keys[number::2]}, adapter / name)
    index = adapter / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: names[number % 2] for number, key in enumerate(keys)}}))
    assert len(read_lora(adapter).tensors) == 14
    (adapter / names[1]).unlink()
    with pytest.raises(XloomError, match="do not make a whole"):
        read_lora(adapter)
    index.unlink()
    with pytest.raises(XloomError, match="do not make a whole"):
        read_lora(adapter)


def test_what_rides_along_is_compared_with_the_base(llama: Path, tmp_path: Path, shapes: Shapes) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama)
    file = adapter / "adapter_model.safetensors"
    lora, own = load_file(file), load_file(llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{V_PROJ}.base_layer.weight", "model.norm.weight"):
        original = own[name.replace(".base_layer", "")]
        save_file(lora | {f"base_model.model.{name}": original.to(torch.bfloat16)}, file)
        prepare_lora(adapter, shapes, tmp_path / "out", max_rank=64, base=BaseWeights(str(llama)))
        save_file(lora | {f"base_model.model.{name}": original * 1.01}, file)
        assert "changes the base model's own" in refused_adapter(adapter, shapes, llama).message
    save_file(lora | {"base_model.model.lm_head.weight": torch.ones(300, 64)}, file)
    assert "[300, 64] in place of [288, 64]" in refused_adapter(adapter, shapes, llama).message
    with pytest.raises(XloomError, match="not known of the base model"):
        read_lora(adapter, shapes, BaseWeights(str(tmp_path / "nowhere")))


def test_float8_and_a_byte_order_mark_are_read(llama: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", llama)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    save_file({key: value.to(torch.float8_e5m2) for key, value in load_file(file).items()}, file)
    config.write_text(config.read_text(), encoding="utf-8-sig")
    assert {tensor.dtype for pair in read_lora(adapter).tensors.values() for tensor in pair} == {torch.bfloat16}
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2).to(torch.float8_e8m0fnu)}, file)
    with pytest.raises(XloomError, match="not floats"):
        read_lora(adapter)
