from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft.tuners.lora import Linear

from tests.models import ARCHITECTURES, adapters_for, load_model, peft_xlora, tiny_bundle
from xloom.mixtures.modules import linear_modules
from xloom.protocol import XloomError


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_shapes_are_those_of_the_loaded_model(model_of: Callable[[str], Path], architecture: str) -> None:
    folder = model_of(architecture)
    parameters = dict(load_model(folder).named_parameters())
    modules = linear_modules(str(folder))
    assert "lm_head" in modules
    for name, shape in modules.items():
        assert tuple(parameters[f"{name}.weight"].shape) == shape


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "mixtral"])
def test_order_is_that_in_which_peft_numbers_xlora_layers(
    model_of: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = model_of(architecture)
    model = peft_xlora(folder, tiny_bundle(tmp_path, folder, adapters=adapters_for(architecture)))
    # Each module's forward is a method of the numbered peft.tuners.xlora.layer.XLoraLinearLayer that took its place.
    numbered = {
        module.forward.__self__.layer_number: name
        for name, module in model.base_model.lora_model.model.named_modules()
        if isinstance(module, Linear)
    }
    in_peft = [numbered[number] for number in range(len(numbered))]
    assert in_peft == [name for name in linear_modules(str(folder)) if name in set(in_peft)]
    assert len(in_peft) > 4


def test_a_source_that_is_no_model_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(XloomError) as raised:
        linear_modules(str(tmp_path))
    assert raised.value.code == "unreadable_model"
