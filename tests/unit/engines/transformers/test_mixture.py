"""X-LoRA's figures from the `transformers` backend's batches, against the plain torch reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import load_model, tiny_bundle, tiny_model
from xloom.engines.transformers.batch import ATTENTION, BatchRunner, Part
from xloom.mixtures.hooks import Adapter
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.reference import Reference

PROMPTS = [list(range(40, 75)), [256, 5, 9, 200]]


@pytest.mark.parametrize("batching", [True, False], ids=["packed", "one after another"])
def test_figures_are_those_of_the_references_gates(tmp_path: Path, batching: bool) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    bundle = tiny_bundle(tmp_path / "blend", folder, seed=3)
    prepare_bundle(
        bundle, linear_modules(str(folder)), tmp_path / "prepared", hidden_size=64, max_rank=64,
    )  # fmt: skip
    blend = Adapter.load(tmp_path / "prepared")
    attention = ATTENTION if batching else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    runner = BatchRunner(model, batching=batching)

    kinds = [blend, blend, None]
    runner.run([
        Part(prompt, 0, kind, runner.caches(kind))
        for prompt, kind in zip([*PROMPTS, PROMPTS[0]], kinds, strict=True)
    ])  # fmt: skip

    figures, _ = runner.tally.take()
    reference = Reference.load(load_model(folder), tmp_path / "prepared")
    expected = sum(reference.gates(prompt).mean(1).sum(0) for prompt in PROMPTS)
    assert figures is not None
    assert figures.steps == (1 if batching else 2)
    assert 0 < figures.scaling_seconds < figures.seconds
    assert figures.bundles[0].tokens == sum(map(len, PROMPTS))
    assert list(figures.bundles[0].gates.values()) == pytest.approx(expected.tolist(), abs=1e-3)

    runner.run([Part(PROMPTS[0], 0, None, runner.caches(None))])
    assert runner.tally.take() == (None, False)
