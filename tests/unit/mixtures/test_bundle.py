from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import HIDDEN, peft_xlora, tiny_adapter, tiny_bundle
from xloom.mixtures.bundle import is_bundle, read_bundle
from xloom.protocol import XloomError

SMALL: tuple[dict[str, Any], ...] = tuple({"rank": rank, "targets": ("q_proj",)} for rank in (2, 3))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder: Path, root: Path | None = None) -> XloomError:
    with pytest.raises(XloomError) as raised:
        read_bundle(folder, root)
    assert raised.value.cure
    assert raised.value.status == 400
    return raised.value


@pytest.mark.parametrize("fmt", ["peft", "xlora"])
def test_both_formats_are_known_for_bundles(llama: Path, tmp_path: Path, fmt: str) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, fmt=fmt, adapters=SMALL, depth=2)
    assert is_bundle(bundle)
    assert not is_bundle(bundle / "0")
    assert not is_bundle(tmp_path)
    read = read_bundle(bundle)
    assert [adapter.max_rank for adapter in read.adapters] == [2, 3]
    assert read.adapter_names == ("0", "1")
    assert read.hidden_size == HIDDEN
    assert [tuple(linear.weight.shape) for linear in read.classifier] == [(48, HIDDEN), (4, 48)]


def test_adapters_may_lie_beside_the_bundle(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "blend", llama, adapters=SMALL)
    for number, name in enumerate(("code", "maths")):
        shutil.move(bundle / str(number), tmp_path / "adapters" / name)
    change_config(bundle, adapters={"0": "../adapters/code", "1": "../adapters/maths"})
    assert read_bundle(bundle).adapter_names == ("code", "maths")
    change_config(bundle, adapters={name: str(tmp_path / "adapters" / name) for name in ("code", "maths")})
    assert read_bundle(bundle, root=tmp_path).adapter_names == ("code", "maths")


def test_fetched_adapters_are_called_by_what_the_bundle_calls_them(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "blend", llama, adapters=SMALL)
    for name in ("0", "1"):  # where a store brings them
        shutil.move(bundle / name, bundle / "adapters" / name)
    readable, alike = ("../adapters/code", "org/maths"), ("a/last", "b/last")
    for paths, called in ((readable, ("code", "maths")), (alike, ("0", "1"))):
        change_config(bundle, adapters=dict(zip(("0", "1"), paths, strict=True)))
        assert read_bundle(bundle).adapter_names == called


@pytest.mark.parametrize("adapters", [{"0": "/not/there", "1": "org/hub-id"}, None, {}, ["0", "1"]])
def test_adapters_are_found_in_numbered_sub_folders(llama: Path, tmp_path: Path, adapters: Any) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=SMALL)
    change_config(bundle, adapters=adapters)
    assert [adapter.max_rank for adapter in read_bundle(bundle).adapters] == [2, 3]


def test_adapters_are_found_by_name_where_the_xlora_package_saves_them(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, fmt="xlora", adapters=SMALL)
    for number, name in enumerate(("code", "maths")):
        shutil.move(bundle / str(number), bundle / "adapters" / name)
    file = bundle / "xlora_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": ["maths", "code"]}))
    read = read_bundle(bundle)
    assert read.adapter_names == ("maths", "code")
    assert [adapter.max_rank for adapter in read.adapters] == [3, 2]


def test_numbered_adapters_are_ordered_by_number(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=[SMALL[0]] * 10 + [SMALL[1]])
    config = json.loads((bundle / "adapter_config.json").read_text())
    (bundle / "adapter_config.json").write_text(json.dumps(config, sort_keys=True))  # "10" before "2", as PEFT saves
    assert [adapter.max_rank for adapter in read_bundle(bundle).adapters] == [2] * 10 + [3]


def test_a_missing_adapter_folder_is_named(bundle: Path) -> None:
    shutil.rmtree(bundle / "1")
    error = refusal(bundle)
    assert error.code == "broken_bundle"
    assert "adapter '1' is missing" in error.message


@pytest.mark.parametrize("path", ["../../elsewhere", "../../../../../../etc"])
def test_a_path_out_of_the_bundles_surroundings_is_refused(bundle: Path, path: str) -> None:
    change_config(bundle, adapters={"0": path, "1": "1", "2": "2"})
    error = refusal(bundle)
    assert error.code == "broken_bundle"
    assert "leads out" in error.message


def test_an_absolute_path_outside_a_given_root_is_not_followed(llama: Path, bundle: Path, tmp_path: Path) -> None:
    outside = tiny_adapter(tmp_path / "outside", llama, rank=5)
    change_config(bundle, adapters={"0": str(outside), "1": "1", "2": "2"})
    assert read_bundle(bundle).adapters[0].max_rank == 5
    assert read_bundle(bundle, root=bundle).adapters[0].max_rank == 8
    shutil.rmtree(bundle / "0")
    assert "is missing" in refusal(bundle, root=bundle).message


def test_an_empty_classifier_names_peft_and_the_cure(bundle: Path) -> None:
    save_file({}, bundle / "adapter_model.safetensors")
    error = refusal(bundle)
    assert error.code == "broken_bundle"
    assert "PEFT 0.20" in error.message
    assert "0.19" in error.cure


def test_a_classifier_that_lost_its_first_layer_is_refused(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, depth=2)
    tensors = load_file(bundle / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.0." not in k}, bundle / "adapter_model.safetensors")
    assert "PEFT 0.20" in refusal(bundle).message


def test_classifier_layers_that_do_not_fit_together_are_refused(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, depth=2)
    tensors = load_file(bundle / "adapter_model.safetensors")
    key = "base_model.internal_xlora_classifier.layers.3.weight"
    save_file(tensors | {key: tensors[key][:, 1:].contiguous()}, bundle / "adapter_model.safetensors")
    assert refusal(bundle).code == "broken_bundle"


@pytest.mark.parametrize(("fmt", "name"), [("peft", "adapter_model"), ("xlora", "xlora_classifier")])
def test_a_pickled_classifier_is_refused_unopened(llama: Path, tmp_path: Path, fmt: str, name: str) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, fmt=fmt, adapters=SMALL)
    (bundle / f"{name}.safetensors").rename(bundle / f"{name}.pt")
    assert refusal(bundle).code == "pickle_refused"


def test_a_pickled_adapter_in_a_bundle_is_refused(bundle: Path) -> None:
    (bundle / "2" / "adapter_model.safetensors").rename(bundle / "2" / "adapter_model.bin")
    assert refusal(bundle).code == "pickle_refused"


def test_dora_in_a_bundle_is_refused(bundle: Path) -> None:
    change_config(bundle / "0", use_dora=True)
    error = refusal(bundle)
    assert error.code == "unsupported_adapter"
    assert "DoRA" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"softmax_temperature": 0},
        {"softmax_temperature": "warm"},
        {"mixing_mode": "shaken"},
        {"peft_type": "LORA"},
        {"adapters": {"0": "0", "7": "7"}},
        {"adapters": {"0": "0", "code": "../outside"}, "hidden_size": "wide"},
    ],
)
def test_a_wrong_configuration_is_refused(bundle: Path, changes: dict[str, Any]) -> None:
    change_config(bundle, **changes)
    assert refusal(bundle).code == "broken_bundle"


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").code == "broken_bundle"
    assert refusal(tmp_path).code == "broken_bundle"


def test_a_projection_is_read_by_module(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=SMALL, projection=True)
    projection = read_bundle(bundle).projection
    assert projection is not None
    assert projection["model.layers.1.self_attn.q_proj"].shape == torch.Size([128, 5])


def test_what_peft_itself_saves_is_read_or_its_loss_is_named(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=SMALL)
    model = peft_xlora(llama, bundle)
    model.save_pretrained(tmp_path / "saved")
    assert is_bundle(tmp_path / "saved")
    assert "PEFT 0.20" in refusal(tmp_path / "saved").message
    # The cure that the message and docs/x-lora.md give.
    state = model.base_model.internal_xlora_classifier.state_dict()
    prefix = "base_model.internal_xlora_classifier."
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "saved" / "adapter_model.safetensors")
    saved, original = read_bundle(tmp_path / "saved"), read_bundle(bundle)
    assert torch.equal(saved.classifier[0].weight, original.classifier[0].weight)
    assert saved.options == original.options
