"""Mixtures of one row a token, prepared and run in plain torch: against PEFT, and against the formulas written out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import (
    ADAPTERS,
    linear_router,
    load_model,
    peft_arrow,
    peft_greedy,
    peft_logits,
    peft_lora,
    tiny_adapter,
)
from xloom.mixtures.linear_router import LinearRouter, save_linear_router
from xloom.mixtures.lora import read_lora
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_lora
from xloom.mixtures.prepare_mixture import prepare_linear, prepare_mixture
from xloom.mixtures.reference import OnePassReference
from xloom.mixtures.routing.arrow import prototype
from xloom.mixtures.stacking import Prepared
from xloom.protocol import Blend, XloomError

PROMPT = [72, 17, 203, 5, 140, 99, 7, 250, 31, 64, 12, 181]
SAME: tuple[dict[str, Any], ...] = tuple(
    {"rank": 4, "alpha": alpha, "targets": ("q_proj", "v_proj", "down_proj"), "leading": 4.0} for alpha in (8, 12, 5)
)
NAMES = ("code", "docs", "maths")


def adapters(root: Path, model: Path, specs: Sequence[Mapping[str, Any]] = SAME) -> dict[str, Path]:
    """Adapter folders by name, in the order of the specifications."""
    return {
        name: tiny_adapter(root / name, model, seed=number, **spec)
        for number, (name, spec) in enumerate(zip(NAMES, specs, strict=False))
    }


def prepare(model: Path, folders: dict[str, Path], out: Path, routing: str, **options: Any) -> Prepared:
    blend = Blend(routing, dict.fromkeys(folders, ""), **options)
    return prepare_mixture(blend, folders, linear_modules(str(model)), out, max_rank=64)


class Formula:
    """Mixtures as the formulas say, module by module, from the adapters themselves."""

    def __init__(self, model: Path, folders: dict[str, Path]) -> None:
        self.model = load_model(model)
        self.adapters = [read_lora(folder) for folder in folders.values()]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], gates_of: Any) -> Tensor:
        """`gates_of(module, holders, x)`: a gate `[..., 1]` for each adapter that has the module."""
        handles = []
        for name, linear in self.model.named_modules():
            holders = [k for k, adapter in enumerate(self.adapters) if name in adapter.tensors]
            if holders:
                handles.append(linear.register_forward_hook(self._hook(name, holders, gates_of)))
        try:
            return peft_logits(self.model, ids)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, holders: list[int], gates_of: Any) -> Any:
        def add(linear: torch.nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            for k, gate in zip(holders, gates_of(name, holders, args[0]), strict=True):
                a, b = self.adapters[k].tensors[name]
                result = result + gate * self.adapters[k].scale(name) * ((args[0] @ a.T) @ b.T)
            return result

        return add

    def arrow(self, top_k: int, temperature: float) -> Any:
        def gates(name: str, holders: list[int], x: Tensor) -> list[Tensor]:
            logits = torch.stack([(x @ singular(*self.adapters[k].tensors[name])).abs() for k in holders], dim=-1)
            least = logits.sort(dim=-1, descending=True).values[..., min(top_k, len(holders)) - 1, None]
            kept = torch.where(logits >= least, (logits / temperature).exp(), 0)
            return list((kept / kept.sum(-1, keepdim=True)).unsqueeze(-1).unbind(-2))

        return gates


def singular(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.svd(b @ a)[2][0]


@pytest.mark.parametrize(("rank", "outputs"), [(4, 20), (6, 3), (1, 1)])
def test_a_prototype_is_the_top_right_singular_vector(rank: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(rank, 16, generator=generator), torch.randn(outputs, rank, generator=generator)
    found, expected = prototype(a, b), singular(a, b)
    torch.testing.assert_close(found * torch.sign(found @ expected), expected, atol=1e-4, rtol=1e-4)
    assert not prototype(a, torch.zeros(outputs, rank)).any()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0)])
def test_arrow_equals_peft(model_of: Any, tmp_path: Path, architecture: str, top_k: int, temperature: float) -> None:
    model = model_of(architecture)
    folders = adapters(tmp_path, model)
    prepare(model, folders, tmp_path / "out", "arrow", top_k=top_k, temperature=temperature)
    found = OnePassReference.load(load_model(model), tmp_path / "out")
    peft = peft_arrow(model, list(folders.values()), top_k, temperature)
    torch.testing.assert_close(found.logits(PROMPT), peft_logits(peft, PROMPT), atol=1e-3, rtol=0)
    assert found.greedy(PROMPT, 8) == peft_greedy(peft, PROMPT, 8)
    assert (found.logits(PROMPT) - peft_logits(load_model(model), PROMPT)).abs().max() > 0.5


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (None, 2.0)])
def test_arrow_over_adapters_of_other_ranks_scales_and_targets(
    llama: Path, tmp_path: Path, top_k: int | None, temperature: float
) -> None:
    folders = adapters(tmp_path, llama, ADAPTERS)
    prepare(llama, folders, tmp_path / "out", "arrow", top_k=top_k, temperature=temperature)
    formula = Formula(llama, folders)
    expected = formula.logits(PROMPT, formula.arrow(top_k or 3, temperature))
    found = OnePassReference.load(load_model(llama), tmp_path / "out").logits(PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("weights", [{"code": 0.7, "docs": 0.3}, {"code": 1.5, "docs": -0.5, "maths": 0.25}])
def test_fixed_equals_pefts_weighted_adapter(llama: Path, tmp_path: Path, weights: dict[str, float]) -> None:
    folders = adapters(tmp_path, llama)
    prepare(llama, folders, tmp_path / "out", "fixed", weights=weights)
    peft: Any = peft_lora(llama, folders["code"])
    for name in ("docs", "maths"):
        peft.load_adapter(folders[name], name)
    positive = {("default" if name == "code" else name): weight for name, weight in weights.items()}
    peft.add_weighted_adapter(list(positive), list(positive.values()), "mixed", combination_type="cat")
    peft.set_adapter("mixed")
    found = OnePassReference.load(load_model(llama), tmp_path / "out").logits(PROMPT)
    torch.testing.assert_close(found, peft_logits(peft, PROMPT), atol=1e-3, rtol=0)


def test_one_adapter_with_weight_1_is_that_adapter(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path, llama, ADAPTERS)  # rsLoRA among them
    prepare(llama, folders, tmp_path / "out", "fixed")
    for name, folder in folders.items():
        found = OnePassReference.load(load_model(llama), tmp_path / "out", {name: 1.0}).logits(PROMPT)
        torch.testing.assert_close(found, peft_logits(peft_lora(llama, folder), PROMPT), atol=1e-3, rtol=0)


def test_fixed_without_weights_is_the_mean_of_the_adapters(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path, llama, ADAPTERS)
    prepare(llama, folders, tmp_path / "out", "fixed")
    expected = Formula(llama, folders).logits(PROMPT, lambda name, holders, x: [1 / 3] * len(holders))
    found = OnePassReference.load(load_model(llama), tmp_path / "out").logits(PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 2, "temperature": 3.0},
        {"activation": "sigmoid"},
        {"activation": "sigmoid", "top_k": 2},
    ],
)
def test_a_linear_router_equals_its_formula(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folders = adapters(tmp_path / "bundle", llama, ADAPTERS)
    router = linear_router(llama, folders, **options)
    save_linear_router(tmp_path / "bundle", router)
    prepare_linear(tmp_path / "bundle", linear_modules(str(llama)), tmp_path / "out", max_rank=64)
    found = OnePassReference.load(load_model(llama), tmp_path / "out").logits(PROMPT)

    def gates(name: str, holders: list[int], x: Tensor) -> list[Tensor]:
        weight, bias = router.layers[name]
        logits = (x @ weight[holders].T + bias[holders]) / router.temperature
        least = logits.sort(dim=-1, descending=True).values[..., min(router.top_k or 3, len(holders)) - 1, None]
        if router.activation == "sigmoid":
            kept = torch.where(logits >= least, logits.sigmoid(), 0)
        else:
            kept = torch.where(logits >= least, logits.exp(), 0)
            kept = kept / kept.sum(-1, keepdim=True)
        return list(kept.unsqueeze(-1).unbind(-2))

    torch.testing.assert_close(found, Formula(llama, folders).logits(PROMPT, gates), atol=1e-3, rtol=0)


def test_the_same_adapters_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path, llama, ADAPTERS)
    for out in ("one", "two"):
        assert prepare(llama, folders, tmp_path / out, "arrow").rank == 14
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("routing", "options", "code"),
    [
        ("xlora", {}, "invalid_mixture"),
        ("arrow", {"top_k": 4}, "invalid_mixture"),
        ("arrow", {"top_k": 0}, "invalid_mixture"),
        ("arrow", {"temperature": 0.0}, "invalid_mixture"),
        ("arrow", {"temperature": float("nan")}, "invalid_mixture"),
        ("arrow", {"weights": {"code": 1.0}}, "invalid_mixture"),
        ("fixed", {"top_k": 1}, "invalid_mixture"),
        ("fixed", {"weights": {"poems": 1.0}}, "invalid_weights"),
        ("fixed", {"weights": {"code": float("nan")}}, "invalid_weights"),
        ("fixed", {"weights": {"code": 1e9}}, "invalid_weights"),
    ],
)
def test_what_can_not_be_mixed_is_refused(
    llama: Path, tmp_path: Path, routing: str, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(XloomError) as failure:
        prepare(llama, adapters(tmp_path, llama), tmp_path / "out", routing, **options)
    assert failure.value.code == code


def test_ranks_beyond_the_limit_are_refused(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path, llama)
    blend = Blend("arrow", dict.fromkeys(folders, ""))
    with pytest.raises(XloomError) as failure:
        prepare_mixture(blend, folders, linear_modules(str(llama)), tmp_path / "out", max_rank=11)
    assert failure.value.code == "rank_too_large"


def test_a_router_without_weights_for_a_linear_is_refused(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path / "bundle", llama)
    router = linear_router(llama, folders)
    name = "model.layers.1.mlp.down_proj"
    layers = {key: value for key, value in router.layers.items() if key != name}
    save_linear_router(tmp_path / "bundle", LinearRouter(router.adapters, layers))
    with pytest.raises(XloomError, match=name):
        prepare_linear(tmp_path / "bundle", linear_modules(str(llama)), tmp_path / "out", max_rank=64)


def test_a_router_names_no_folder_outside(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path / "bundle", llama)
    router = linear_router(llama, folders)
    save_linear_router(tmp_path / "bundle", router)
    file = tmp_path / "bundle" / "router_config.json"
    outside = tiny_adapter(tmp_path / "other" / "code", llama)
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"adapters": dict(router.adapters) | {"code": str(outside)}})
    )
    (tmp_path / "bundle" / "code").rename(tmp_path / "bundle" / "away")
    with pytest.raises(XloomError) as failure:
        prepare_linear(
            tmp_path / "bundle", linear_modules(str(llama)), tmp_path / "out", max_rank=64, root=tmp_path / "bundle"
        )
    assert failure.value.code == "broken_bundle"


def test_a_mixture_is_read_as_one_pass(llama: Path, tmp_path: Path) -> None:
    folders = adapters(tmp_path, llama)
    prepare_lora(folders["code"], linear_modules(str(llama)), tmp_path / "plain", max_rank=64)
    plain = OnePassReference.load(load_model(llama), tmp_path / "plain").logits(PROMPT)
    torch.testing.assert_close(plain, peft_logits(peft_lora(llama, folders["code"]), PROMPT), atol=1e-3, rtol=0)
