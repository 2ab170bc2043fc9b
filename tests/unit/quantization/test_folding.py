"""Adapters on a folded base: B A x as before, from the inputs and to the outputs the folded linear has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models import HIDDEN, tiny_adapter, tiny_bundle, tiny_model
from xloom.mixtures.lora import read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.routing.arrow import ArrowRouting
from xloom.mixtures.routing.registry import load_routing
from xloom.protocol import Blend
from xloom.quantization.folding import FOLDING_FILE, read_folding, rescale

MODULE = "model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


def folding_of(model: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (rows, columns) in linear_modules(str(model)).items():
        found[f"{name}.input"] = torch.exp(torch.randn(columns, generator=generator))
        if name.endswith(("v_proj", "up_proj")):
            found[f"{name}.output"] = torch.exp(torch.randn(rows, generator=generator))
    return found


def test_the_rescaled_adapter_gives_what_it_gave_in_the_folded_coordinates(model: Path, tmp_path: Path) -> None:
    modules = linear_modules(str(model))
    prepare_lora(tiny_adapter(tmp_path / "adapter", model, seed=1), modules, tmp_path / "prepared", max_rank=64)
    folding = folding_of(model)
    before = read_lora(tmp_path / "prepared")
    after = read_lora(rescale(tmp_path / "prepared", tmp_path / "rescaled", folding))
    assert set(after.tensors) == set(before.tensors)
    for name, (a, b) in before.tensors.items():
        x = torch.randn(5, a.shape[1])
        y = x @ a.T @ b.T
        s_in = folding[f"{name}.input"]
        s_out = folding.get(f"{name}.output", torch.ones(b.shape[0]))
        new_a, new_b = after.tensors[name]
        torch.testing.assert_close((x / s_in) @ new_a.T @ new_b.T, y / s_out, rtol=1e-4, atol=1e-5)
        assert after.scale(name) == before.scale(name)


def test_a_bundle_keeps_its_routing_and_its_ranks(model: Path, tmp_path: Path) -> None:
    prepare_bundle(
        tiny_bundle(tmp_path / "bundle", model), linear_modules(str(model)), tmp_path / "prepared",
        hidden_size=HIDDEN, max_rank=64,
    )  # fmt: skip
    out = rescale(tmp_path / "prepared", tmp_path / "rescaled", folding_of(model))
    for name in ("xlora.json", "xlora_router.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "prepared" / name).read_bytes()
    assert read_lora(out).max_rank == read_lora(tmp_path / "prepared").max_rank


def test_a_router_of_inputs_gives_the_gates_it_gave(model: Path, tmp_path: Path) -> None:
    folders = {name: tiny_adapter(tmp_path / name, model, seed=seed) for name, seed in (("one", 1), ("two", 2))}
    modules, blend = linear_modules(str(model)), Blend("arrow", dict.fromkeys(folders, ""))
    prepare_mixture(blend, folders, modules, tmp_path / "prepared", max_rank=64)
    folding = folding_of(model)
    rescale(tmp_path / "prepared", tmp_path / "rescaled", folding)
    before, after = (load_routing(tmp_path / name) for name in ("prepared", "rescaled"))
    assert isinstance(before, ArrowRouting)
    assert isinstance(after, ArrowRouting)
    for number, name in enumerate(before.modules):
        x = torch.randn(5, modules[name][1])
        rescaled = x / folding[f"{name}.input"]
        torch.testing.assert_close(after.gates(number, rescaled), before.gates(number, x), rtol=1e-4, atol=1e-5)


def test_modules_that_were_not_folded_stay_as_they_were(model: Path, tmp_path: Path) -> None:
    modules = linear_modules(str(model))
    prepare_lora(tiny_adapter(tmp_path / "adapter", model, seed=1), modules, tmp_path / "prepared", max_rank=64)
    folding = {key: value for key, value in folding_of(model).items() if key.startswith(MODULE)}
    before = read_lora(tmp_path / "prepared")
    after = read_lora(rescale(tmp_path / "prepared", tmp_path / "rescaled", folding))
    for name in before.tensors:
        same = all(torch.equal(x, y) for x, y in zip(before.tensors[name], after.tensors[name], strict=True))
        assert same == (name != MODULE)


def test_a_model_without_folding_has_none(tmp_path: Path) -> None:
    assert read_folding(tmp_path) is None
    assert read_folding(Path("some/hub-id")) is None
    (tmp_path / FOLDING_FILE).parent.mkdir()
    save_file({f"{MODULE}.input": torch.ones(3)}, tmp_path / FOLDING_FILE)
    found = read_folding(tmp_path)
    assert found is not None
    assert list(found) == [f"{MODULE}.input"]
