from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import ADAPTERS, tiny_adapter, tiny_bundle
from xloom.mixtures.lora import read_lora
from xloom.mixtures.prepare import Prepared, prepare_bundle, prepare_lora
from xloom.protocol import Overrides, XloomError

Shapes = dict[str, tuple[int, int]]
Q_PROJ, O_PROJ, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))


def prepare(bundle: Path, shapes: Shapes, out: Path | None = None, **overrides: Any) -> Prepared:
    options: dict[str, Any] = {"max_rank": 64, "hidden_size": 64}
    options |= {name: overrides.pop(name) for name in list(overrides) if name not in Overrides.__struct_fields__}
    options["overrides"] = Overrides(**overrides)
    return prepare_bundle(bundle, shapes, out or bundle.with_name("out"), **options)


def refusal(bundle: Path, shapes: Shapes, **overrides: Any) -> XloomError:
    with pytest.raises(XloomError) as raised:
        prepare(bundle, shapes, **overrides)
    assert raised.value.cure
    assert not bundle.with_name("out").exists()  # nothing is written before everything is checked
    return raised.value


def test_ranks_add_up_per_module(bundle: Path, shapes: Shapes, tmp_path: Path) -> None:
    prepared = prepare(bundle, shapes)
    stacked = read_lora(tmp_path / "out")
    assert stacked.rank(Q_PROJ) == 8 + 4
    assert stacked.rank(O_PROJ) == 8 + 6
    assert prepared.rank == stacked.max_rank == stacked.r == 14
    assert {stacked.scale(name) for name in stacked.tensors} == {1.0}
    assert prepared.targets == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert prepared.size == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_stacked_weights_are_the_adapters_side_by_side(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, global_scaling_weight=0.5)
    prepare(bundle, shapes)
    a, b = read_lora(tmp_path / "out").tensors[DOWN]
    first, second = (read_lora(bundle / name).tensors[DOWN] for name in ("0", "1"))
    assert torch.equal(a, torch.cat([first[0], second[0]]))
    # alpha / r is 16 / 8 for the first; the second is rsLoRA: 4 / sqrt(4)
    torch.testing.assert_close(b, torch.cat([first[1] * (2 * 0.5), second[1] * (2 * 0.5)], dim=1))


@pytest.mark.parametrize(("alpha", "stored"), [(16.0, torch.bfloat16), (12.0, torch.float32)])
def test_scales_of_narrow_adapters_are_not_rounded_into_b(
    llama: Path, shapes: Shapes, tmp_path: Path, alpha: float, stored: torch.dtype
) -> None:
    specs = [{"rank": 8, "alpha": alpha, "targets": ("q_proj",), "dtype": torch.bfloat16} for _ in range(3)]
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=specs)
    prepare(bundle, shapes)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    b = tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"]
    own = [read_lora(bundle / str(number)).tensors[Q_PROJ][1].double() * (alpha / 8) for number in range(3)]
    assert b.dtype == stored
    torch.testing.assert_close(b.double(), torch.cat(own, dim=1), rtol=2**-23, atol=0)


def test_preparing_twice_gives_the_same_bytes(bundle: Path, shapes: Shapes, tmp_path: Path) -> None:
    prepare(bundle, shapes, tmp_path / "one")
    prepare(bundle, shapes, tmp_path / "two")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "xlora.json", "xlora_router.safetensors"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16,) * 3, torch.bfloat16),
        ((torch.bfloat16, torch.float32, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.float16, torch.float16), torch.float32),
    ],
)
def test_mixed_dtypes_are_promoted(
    llama: Path, shapes: Shapes, tmp_path: Path, dtypes: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    adapters = [dict(spec) | {"dtype": dtype} for spec, dtype in zip(ADAPTERS, dtypes, strict=True)]
    prepare(tiny_bundle(tmp_path / "bundle", llama, adapters=adapters), shapes)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # Of B it holds where no scale would be rounded: see above.
    assert {tensor.dtype for key, tensor in tensors.items() if ".lora_A." in key} == {expected}


def test_a_sum_of_ranks_over_the_limit_is_refused(bundle: Path, shapes: Shapes) -> None:
    error = refusal(bundle, shapes, max_rank=13)
    assert error.code == "rank_too_large"
    assert "14" in error.message
    prepare(bundle, shapes, max_rank=14)


@pytest.mark.parametrize("hidden_size", [32, 128])
def test_a_classifier_for_another_hidden_size_is_refused(bundle: Path, shapes: Shapes, hidden_size: int) -> None:
    error = refusal(bundle, shapes, hidden_size=hidden_size)
    assert error.code == "broken_bundle"
    assert "hidden size" in error.message


@pytest.mark.parametrize(("layerwise", "needed"), [(True, 42), (False, 3)])
def test_a_wrong_number_of_classifier_outputs_is_refused(
    llama: Path, shapes: Shapes, tmp_path: Path, layerwise: bool, needed: int
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, layerwise=layerwise)
    file = bundle / "adapter_model.safetensors"
    save_file({key: tensor[:-1].contiguous() for key, tensor in load_file(file).items()}, file)
    error = refusal(bundle, shapes)
    assert error.code == "broken_bundle"
    assert f"{needed - 1} outputs" in error.message
    assert str(needed) in error.message


def test_an_adapter_of_another_base_is_refused(bundle: Path, shapes: Shapes) -> None:
    assert refusal(bundle, {name: shape for name, shape in shapes.items() if name != Q_PROJ}).code == "wrong_base"
    assert refusal(bundle, shapes | {Q_PROJ: (64, 64)}).code == "wrong_shape"


def test_lm_head_in_a_bundle_is_refused(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=[{"rank": 2, "targets": ("q_proj", "lm_head")}])
    error = refusal(bundle, shapes)
    assert error.code == "unsupported_target"
    assert "lm_head" in error.message


@pytest.mark.parametrize(
    "overrides",
    [
        {"top_k": 4},
        {"top_k": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"mixing_mode": "shaken"},
        {"routing_passes": 3},
        {"routing_passes": 1, "prefill": "none"},
        {"prefill": "lagged"},
    ],
)
def test_an_override_out_of_range_is_refused(bundle: Path, shapes: Shapes, overrides: dict[str, Any]) -> None:
    assert refusal(bundle, shapes, **overrides).code == "invalid_override"


def test_a_temperature_without_effect_is_refused(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, softmax=False)
    assert refusal(bundle, shapes, temperature=0.5).code == "invalid_override"
    prepare(bundle, shapes, temperature=0.5, mixing_mode="gated")


def test_the_bundles_own_top_k_out_of_range_is_refused(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    assert refusal(tiny_bundle(tmp_path / "bundle", llama, top_k=4), shapes).code == "broken_bundle"


def test_a_projection_that_misses_a_module_is_refused(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, mixing_mode="concatenate", projection=True)
    file = bundle / "xlora_projection.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if Q_PROJ not in key}, file)
    assert Q_PROJ in refusal(bundle, shapes).message
    save_file(tensors | {f"{Q_PROJ}.weight": torch.ones(128, 11)}, file)
    assert Q_PROJ in refusal(bundle, shapes).message
    prepare(bundle, shapes, mixing_mode="additive")  # which does not use it


def test_a_plain_adapter_is_normalised(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    source = tiny_adapter(tmp_path / "a", llama, rank=4, alpha=6, targets=("q_proj", "lm_head"), rslora=True)
    prepared = prepare_lora(source, shapes, tmp_path / "out", max_rank=4)
    assert (prepared.rank, prepared.targets) == (4, ("lm_head", "q_proj"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, True)
    assert config["target_modules"] == ["lm_head", Q_PROJ, "model.layers.1.self_attn.q_proj"]


def test_a_plain_adapter_over_the_rank_limit_is_refused(llama: Path, shapes: Shapes, tmp_path: Path) -> None:
    source = tiny_adapter(tmp_path / "a", llama, rank=4)
    with pytest.raises(XloomError) as raised:
        prepare_lora(source, shapes, tmp_path / "out", max_rank=3)
    assert raised.value.code == "rank_too_large"
    assert not (tmp_path / "out").exists()
