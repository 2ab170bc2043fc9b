"""Where scales may be folded, by architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import load_model, tiny_model
from xloom.quantization.feeding import Fold, cancelling, norm_folds

IDS = torch.arange(40, 52)[None]
ATTENTION = {"q_proj", "k_proj", "v_proj"}
MLP = {"gate_proj", "up_proj"}
# By norm: the linears that read it, and nothing else does.
FEEDS: dict[str, dict[str, set[str]]] = {
    "llama": {"input_layernorm": ATTENTION, "post_attention_layernorm": MLP},
    "gemma2": {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP},
    "gemma3": {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP},
    "cohere": {"input_layernorm": ATTENTION | MLP},
    "phi3": {"input_layernorm": {"qkv_proj"}, "post_attention_layernorm": {"gate_up_proj"}},
    "starcoder2": {"input_layernorm": ATTENTION, "post_attention_layernorm": {"c_fc"}},
    "mixtral": {"input_layernorm": ATTENTION},  # the experts and their router read the other
    "olmo2": {},  # its norms come after the linears
}


@pytest.mark.parametrize("architecture", FEEDS)
def test_norms_are_folded_into_the_linears_that_read_them(architecture: str, tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, architecture, tied=architecture in ("gemma2", "gemma3", "cohere")))
    found = norm_folds(model, IDS, ["lm_head"])
    kinds = {fold.smooth.rpartition(".")[2]: {name.rpartition(".")[2] for name in fold.behind} for fold in found}
    assert kinds == FEEDS[architecture]
    layers = {fold.smooth.split(".")[2] for fold in found}
    assert len(found) == 2 * len(kinds)
    assert len(layers) == (2 if kinds else 0)
    for fold in found:  # of the norm's own layer
        assert {name.split(".")[2] for name in fold.behind} == {fold.smooth.split(".")[2]}


def test_a_fold_by_names_that_would_change_the_model_is_left_out(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path, "gemma2", tied=True))
    layer = "model.layers.{}"
    right = [Fold(f"{layer.format(n)}.mlp.up_proj", (f"{layer.format(n)}.mlp.down_proj",)) for n in (0, 1)]
    mlp = tuple(f"{layer.format(0)}.mlp.{name}" for name in sorted(MLP))
    wrong = [
        Fold(f"{layer.format(0)}.post_attention_layernorm", mlp),
        Fold(f"{layer.format(0)}.pre_feedforward_layernorm", mlp[:1]),
    ]
    assert cancelling(model, IDS, [*right, *wrong]) == right
