"""The mixture that routers are trained in, against PEFT, the reference, and the formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import ADAPTERS, load_model, peft_logits, peft_lora, tiny_bundle
from xloom.compose.mixture import Mixture
from xloom.compose.router import ConstantRouter, InputRouter
from xloom.compose.teacher import Teacher
from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.lora import read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.reference import Reference
from xloom.mixtures.routing.arrow import ArrowRouting
from xloom.mixtures.stacking import stack_adapters
from xloom.protocol import XloomError

ROWS = torch.randint(0, 256, (2, 14), generator=torch.Generator().manual_seed(3))


def mixture_of(llama: Path, adapters: dict[str, Path]) -> Mixture:
    modules = linear_modules(str(llama))
    stack = stack_adapters({name: read_lora(folder, modules) for name, folder in adapters.items()}, modules)
    return Mixture(load_model(llama), stack)


def test_one_adapter_with_weight_one_is_that_adapter(llama: Path, adapters: dict[str, Path]) -> None:
    mixture = mixture_of(llama, adapters)
    found = mixture.logits(ROWS, ConstantRouter([0.0, 1.0]))
    peft = peft_lora(llama, adapters["sums"])
    for row, logits in zip(ROWS, found, strict=True):
        torch.testing.assert_close(logits, peft_logits(peft, row.tolist()), atol=1e-4, rtol=1e-5)
    plain = mixture.logits(ROWS, None)
    assert (plain - found).abs().max() > 0.1
    torch.testing.assert_close(plain[0], peft_logits(load_model(llama), ROWS[0].tolist()), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"scaling_pass_value": 0.4, "top_k": 1},
        {"layerwise": False, "global_scaling_weight": 0.5, "depth": 2},
        {"mixing_mode": "gated"},
    ],
    ids=str,
)
def test_a_bundles_own_gates_are_the_references(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    bundle, modules = tiny_bundle(tmp_path / "bundle", llama, adapters=ADAPTERS, **options), linear_modules(str(llama))
    teacher = Teacher.read(bundle, modules, 64, None, BaseWeights(str(llama)))
    mixture = Mixture(load_model(llama), stack_adapters(teacher.adapters, modules))
    found = mixture.logits(ROWS, teacher.router(torch.device("cpu")))
    prepare_bundle(bundle, modules, tmp_path / "prepared", hidden_size=64, max_rank=64)
    reference = Reference.load(load_model(llama), tmp_path / "prepared")
    for row, logits in zip(ROWS, found, strict=True):
        torch.testing.assert_close(logits, reference.logits(row.tolist()), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("options", "why"), [({"softmax": False}, "softmax"), ({"global_scaling_weight": 2.0}, "2.0")])
def test_bundles_whose_gates_no_linear_router_can_give_are_refused(
    llama: Path, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, **options)
    with pytest.raises(XloomError) as caught:
        Teacher.read(bundle, linear_modules(str(llama)), 64, None, BaseWeights(str(llama)))
    assert caught.value.code == "not_distillable"
    assert why in caught.value.message


def test_an_adapter_that_lacks_a_linear_has_no_gate_there(llama: Path, tmp_path: Path) -> None:
    bundle, modules = tiny_bundle(tmp_path / "bundle", llama, adapters=ADAPTERS), linear_modules(str(llama))
    adapters = Teacher.read(bundle, modules, 64, None, BaseWeights(str(llama))).adapters
    mixture = Mixture(load_model(llama), stack_adapters(adapters, modules))
    sums = []

    def look(place: int, x: torch.Tensor, gates: torch.Tensor) -> None:
        present = mixture.stack.present(place)
        assert not gates[..., ~present].any()
        sums.append(gates.sum(-1))

    mixture.logits(ROWS, InputRouter(ArrowRouting.of(mixture.stack, list(adapters.values()))), look)
    assert not mixture.stack.even
    torch.testing.assert_close(torch.stack(sums), torch.ones(len(sums), 2, 14))


def test_another_models_adapter_is_refused(llama: Path, adapters: dict[str, Path]) -> None:
    modules = {name.replace("self_attn", "attention"): shape for name, shape in linear_modules(str(llama)).items()}
    with pytest.raises(XloomError) as caught:
        stack_adapters({"words": read_lora(adapters["words"])}, modules)
    assert caught.value.code == "wrong_base"
