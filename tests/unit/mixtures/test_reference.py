"""The reference, and with it the prepared format and the routing, against PEFT and against the formulas written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models import (
    ADAPTERS,
    ARCHITECTURES,
    adapters_for,
    load_model,
    peft_greedy,
    peft_logits,
    peft_lora,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
)
from xloom.mixtures.mixing import gated_delta, rank_gates
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import Prepared, prepare_bundle, prepare_lora
from xloom.mixtures.reference import Reference, reference_greedy, reference_logits
from xloom.mixtures.routing.registry import load_routing
from xloom.mixtures.routing.xlora import XLoraRouting
from xloom.protocol import Overrides

PROMPT = [72, 17, 203, 5, 140, 99, 7, 250, 31, 64, 12, 181]
TWO = ({"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj")}, {"rank": 2, "alpha": 5, "targets": ("down_proj",)})


def prepare(bundle: Path, model: Path, **overrides: Any) -> Path:
    out = bundle.with_name(f"{bundle.name}-{'-'.join(str(value) for value in overrides.values())}-prepared")
    linears, wanted = linear_modules(str(model)), Overrides(**overrides)
    prepared = prepare_bundle(bundle, linears, out, hidden_size=64, max_rank=64, overrides=wanted)
    assert isinstance(prepared, Prepared)
    return out


def assert_equal_to_peft(model: Path, bundle: Path, overrides: Mapping[str, Any] | None = None) -> None:
    base = load_model(model)
    expected = peft_logits(peft_xlora(model, bundle), PROMPT)
    found = reference_logits(base, prepare(bundle, model, **(overrides or {})), PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (expected - peft_logits(base, PROMPT)).abs().max() > 0.5  # the bundle matters


GRID: dict[str, dict[str, Any]] = {
    "plain": {},
    "depth-2": {"depth": 2},
    "depth-3-layerwise-off": {"depth": 3, "layerwise": False},
    "layerwise-off": {"layerwise": False},
    "softmax-off": {"softmax": False},
    "softmax-off-layerwise-off": {"softmax": False, "layerwise": False, "depth": 2},
    "temperature": {"temperature": 0.5},
    "temperature-without-softmax": {"temperature": 0.5, "softmax": False},
    "top-1": {"top_k": 1},
    "top-2-layerwise-off": {"top_k": 2, "layerwise": False},
    "top-2-softmax-off": {"top_k": 2, "softmax": False},
    "softmax-topk": {"top_k": 2, "softmax": False, "softmax_topk": True},
    "softmax-topk-on-softmax": {"top_k": 2, "softmax_topk": True, "temperature": 2.0},
    "softmax-topk-without-k": {"softmax": False, "softmax_topk": True},
    "scaling-pass": {"scaling_pass_value": 0.3},
    "scaling-pass-top-2": {"scaling_pass_value": 0.3, "top_k": 2},
    "scaling-pass-softmax-topk": {"scaling_pass_value": 0.3, "top_k": 1, "softmax": False, "softmax_topk": True},
    "global-weight": {"global_scaling_weight": 1.7, "scaling_pass_value": 0.3},
    "two-adapters": {"adapters": TWO},
    "one-layer-adapted": {"adapters": (*TWO, {"rank": 3, "alpha": 3, "targets": ("q_proj", "o_proj"), "layers": [1]})},
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("case", GRID)
def test_logits_equal_pefts(model_of: Callable[[str], Path], tmp_path: Path, architecture: str, case: str) -> None:
    model = model_of(architecture)
    assert_equal_to_peft(model, tiny_bundle(tmp_path / "bundle", model, **GRID[case]))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("llama", "qwen2")])
def test_logits_equal_pefts_on_every_architecture(
    model_of: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    model = model_of(architecture)
    bundle = tiny_bundle(
        tmp_path / "bundle", model, adapters=adapters_for(architecture), depth=2, scaling_pass_value=0.2
    )
    assert_equal_to_peft(model, bundle)


def test_greedy_tokens_equal_pefts(llama: Path, bundle: Path) -> None:
    expected = peft_greedy(peft_xlora(llama, bundle), PROMPT, 6)
    assert reference_greedy(load_model(llama), prepare(bundle, llama), PROMPT, 6) == expected
    assert peft_greedy(load_model(llama), PROMPT, 6) != expected


def test_overrides_take_the_place_of_the_bundles_options(llama: Path, bundle: Path) -> None:
    expected = peft_logits(peft_xlora(llama, bundle, top_k_lora=1, softmax_temperature=0.4), PROMPT)
    found = reference_logits(load_model(llama), prepare(bundle, llama, top_k=1, temperature=0.4), PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_rank_and_alpha_patterns_equal_pefts(llama: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"model.layers.1.self_attn.q_proj": 20, "v_proj": 3}}
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=TWO)
    tiny_adapter(bundle / "0", llama, rank=8, alpha=6, targets=["q_proj", "v_proj"], config=patterns | {"r": 8})
    assert_equal_to_peft(llama, bundle)


def test_a_prepared_bundle_with_open_gates_is_the_sum_of_its_adapters(llama: Path, bundle: Path) -> None:
    prepared = prepare(bundle, llama)
    base = load_model(llama)
    reference = Reference.load(base, prepared)
    with reference._mixed(torch.ones(len(PROMPT), len(reference.routing.modules), 3)):
        opened = peft_logits(base, PROMPT)
    torch.testing.assert_close(peft_logits(peft_lora(llama, prepared), PROMPT), opened, atol=1e-4, rtol=1e-5)


def test_a_prepared_adapter_equals_its_source(llama: Path, tmp_path: Path) -> None:
    source = tiny_adapter(tmp_path / "a", llama, rank=4, alpha=6, rslora=True)
    prepare_lora(source, linear_modules(str(llama)), tmp_path / "out", max_rank=8)
    found = peft_logits(peft_lora(llama, tmp_path / "out"), PROMPT)
    assert torch.equal(found, peft_logits(peft_lora(llama, source), PROMPT))


def test_the_model_is_left_as_it_was(llama: Path, bundle: Path) -> None:
    base = load_model(llama)
    before = peft_logits(base, PROMPT)
    reference_logits(base, prepare(bundle, llama), PROMPT)
    assert torch.equal(peft_logits(base, PROMPT), before)


def test_concatenate_without_a_projection_is_additive_exactly(llama: Path, bundle: Path) -> None:
    base = load_model(llama)
    additive = reference_logits(base, prepare(bundle, llama, mixing_mode="additive"), PROMPT)
    concatenate = reference_logits(base, prepare(bundle, llama, mixing_mode="concatenate"), PROMPT)
    assert torch.equal(additive, concatenate)


def written_out(model: Path, bundle: Path, gate: Callable[[Tensor], Tensor], projection: bool) -> Tensor:
    """X-LoRA from the bundle's own files, adapter by adapter and token by token, as the formulas say."""
    base = load_model(model)
    adapters = [load_file(bundle / str(k) / "adapter_model.safetensors") for k in range(len(ADAPTERS))]
    scales = [spec["alpha"] / (spec["rank"] ** 0.5 if spec.get("rslora") else spec["rank"]) for spec in ADAPTERS]
    classifier = load_file(bundle / "adapter_model.safetensors")
    prefix = "base_model.internal_xlora_classifier.layers.0"
    weight, bias = classifier[f"{prefix}.weight"], classifier[f"{prefix}.bias"]
    names = [
        name
        for name in linear_modules(str(model))
        if any(f"base_model.model.{name}.lora_A.weight" in adapter for adapter in adapters)
    ]
    with torch.no_grad():
        hidden = base(input_ids=torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
    gates = gate((hidden @ weight.T + bias).view(len(PROMPT), len(names), len(adapters)))
    learned = load_file(bundle / "xlora_projection.safetensors") if projection else {}

    def hook(name: str, row: int) -> Callable[[Any, Any, Tensor], Tensor]:
        def add(module: Any, args: Any, result: Tensor) -> Tensor:
            result = result.clone()
            for t, x in enumerate(args[0][0]):
                parts = []
                for k, adapter in enumerate(adapters):
                    key = f"base_model.model.{name}.lora_"
                    if f"{key}A.weight" in adapter:
                        part = gates[t, row, k] * (adapter[f"{key}A.weight"] @ x)
                        parts.append(part)
                        if not projection:
                            result[0, t] += scales[k] * (adapter[f"{key}B.weight"] @ part)
                if projection:
                    result[0, t] += learned[f"{name}.weight"] @ torch.cat(parts)
            return result

        return add

    linears = dict(base.named_modules())
    for row, name in enumerate(names):
        linears[name].register_forward_hook(hook(name, row))
    return peft_logits(base, PROMPT)


def test_gated_mixes_by_independent_sigmoids(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, temperature=1.5, mixing_mode="gated")
    expected = written_out(llama, bundle, lambda logits: torch.sigmoid(logits / 1.5), projection=False)
    found = reference_logits(load_model(llama), prepare(bundle, llama), PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_a_learned_projection_takes_the_place_of_b(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, mixing_mode="concatenate", projection=True)
    expected = written_out(llama, bundle, lambda logits: torch.softmax(logits, dim=-1), projection=True)
    base = load_model(llama)
    torch.testing.assert_close(reference_logits(base, prepare(bundle, llama), PROMPT), expected, atol=1e-4, rtol=1e-5)
    additive = reference_logits(base, prepare(bundle, llama, mixing_mode="additive"), PROMPT)
    assert (additive - expected).abs().max() > 0.5


def test_the_xlora_packages_format_reads_the_same(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"depth": 2, "top_k": 2, "temperature": 0.7, "scaling_pass_value": 0.1}
    ours = {fmt: prepare(tiny_bundle(tmp_path / fmt, llama, fmt=fmt, **options), llama) for fmt in ("peft", "xlora")}
    for file in ("adapter_model.safetensors", "adapter_config.json", "xlora_router.safetensors", "xlora.json"):
        assert (ours["peft"] / file).read_bytes() == (ours["xlora"] / file).read_bytes()


def test_a_classifier_without_relu_is_folded_into_one_layer(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, fmt="xlora", depth=3, relu=False)
    tensors = load_file(bundle / "xlora_classifier.safetensors")
    routing = load_routing(prepare(bundle, llama))
    assert isinstance(routing, XLoraRouting)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    expected = hidden
    for layer in ("inner.0", "inner.1", "last"):
        expected = expected @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"]
    torch.testing.assert_close(routing.logits(hidden).flatten(1), expected, atol=1e-4, rtol=1e-4)
    assert len(routing.layers) == 1


def test_gates_are_repeated_over_stacked_ranks() -> None:
    gates = torch.tensor([[0.1, 0.2, 0.7]])
    assert rank_gates(gates, [(0, 2), (2, 1)]).tolist() == [pytest.approx([0.1, 0.1, 0.7])]


def test_delta_is_gated_between_a_and_b() -> None:
    x, a, b = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1.0, 10.0]])
    assert gated_delta(x, a, b, torch.tensor([[0.5, 0.25]])).item() == pytest.approx(0.5 + 5.0)


def test_the_prepared_description_says_what_the_bundle_says(llama: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", llama, adapters=TWO, top_k=1, layerwise=False)
    data = json.loads((prepare(bundle, llama) / "xlora.json").read_text())
    assert data["num_adapters"] == 2
    assert data["modules"][:3] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert data["segments"][:3] == [[[0, 4]], [[0, 4]], [[1, 2]]]
    assert data["routing"] == {
        "hidden_size": 64,
        "layerwise_scalings": False,
        "mixing_mode": "additive",
        "enable_softmax": True,
        "temperature": 1.0,
        "top_k": 1,
        "enable_softmax_topk": False,
        "scaling_pass_value": 0.0,
        "routing_passes": 2,
        "prefill": "exact",
    }
