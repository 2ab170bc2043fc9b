"""What an engine would leave out of an adapter, found by name and in the slot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.models.utils import WeightsMapper

from xloom.vllm.plugin.attachment import ADAPTER_FILE, unapplied, unattached

LAYER = "model.layers.0"
SLOTS = 2


class Layer(BaseLayerWithLoRA):
    """A linear with LoRA of as many slices."""

    def __init__(self, slices: int = 1) -> None:
        super().__init__()
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, 4, 8) for _ in range(slices))
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, 8, 4) for _ in range(slices))


def manager(modules: dict[str, Layer], packed: dict[str, list[str]], model: nn.Module | None = None) -> Any:
    """As vLLM's `LoRAModelManager`, with the adapter 7 in its second slot."""
    return SimpleNamespace(
        model=model or nn.Module(), modules=modules, packed_modules=packed,
        lora_index_to_id=[None, 7], activate_adapter=lambda lora_id: False,
    )  # fmt: skip


def adapter(folder: Path, *modules: str) -> Path:
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(8, 2)
    save_file(tensors, folder / ADAPTER_FILE)
    return folder


def test_linears_without_lora_are_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path, f"{LAYER}.q_proj", f"{LAYER}.k_proj", f"{LAYER}.o_proj", f"{LAYER}.extra", "lm_head")
    modules = {f"{LAYER}.qk_proj": Layer(2), f"{LAYER}.o_proj": Layer()}
    packed = {f"{LAYER}.qk_proj": [f"{LAYER}.q_proj", f"{LAYER}.k_proj"]}
    assert unapplied(manager(modules, packed), folder) == ["lm_head", f"{LAYER}.extra"]


def test_names_are_mapped_as_vllm_maps_them(tmp_path: Path) -> None:
    model = nn.Module()
    model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})  # type: ignore[assignment]
    folder = adapter(tmp_path, f"{LAYER}.q_proj", f"{LAYER}.o_proj")
    modules = {f"language_model.{LAYER}.q_proj": Layer(), f"{LAYER}.o_proj": Layer()}
    assert unapplied(manager(modules, {}, model), folder) == [f"{LAYER}.o_proj"]


def test_linears_that_latent_attention_absorbs_are_not_applied(tmp_path: Path) -> None:
    absorbed, attention = Layer(), MLAAttention.__new__(MLAAttention)
    nn.Module.__init__(attention)
    attention.kv_b_proj = absorbed
    model = nn.Module()
    model.attention = attention
    modules = {f"{LAYER}.kv_b_proj": absorbed, f"{LAYER}.o_proj": Layer()}
    folder = adapter(tmp_path, f"{LAYER}.kv_b_proj", f"{LAYER}.o_proj")
    assert unapplied(manager(modules, {}, model), folder) == [f"{LAYER}.kv_b_proj"]


@pytest.mark.parametrize("missing", ["A", "B"])
def test_weights_that_never_reached_the_slot_are_named(tmp_path: Path, missing: str) -> None:
    folder = adapter(tmp_path, f"{LAYER}.q_proj", f"{LAYER}.k_proj")
    fused = Layer(2)
    held = manager({f"{LAYER}.qk_proj": fused}, {f"{LAYER}.qk_proj": [f"{LAYER}.q_proj", f"{LAYER}.k_proj"]})
    for stacked in (*fused.lora_a_stacked, *fused.lora_b_stacked):
        stacked[1] = 1.0
    assert unattached(held, 7, folder) == []
    (fused.lora_a_stacked if missing == "A" else fused.lora_b_stacked)[1][1] = 0.0
    assert unattached(held, 7, folder) == [f"{LAYER}.k_proj"]
