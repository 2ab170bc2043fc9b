"""Mixtures in the `transformers` backend's batches, against the plain torch reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import ADAPTERS, load_model, tiny_adapter, tiny_bundle, tiny_model
from xloom.engines.transformers.batch import ATTENTION, BatchRunner, Part
from xloom.mixtures.hooks import Adapter
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.reference import OnePassReference, Reference
from xloom.mixtures.routing.fixed import FixedRouting
from xloom.mixtures.weights import checked_weights
from xloom.protocol import Blend

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


@pytest.mark.parametrize("batching", [True, False], ids=["packed", "one after another"])
def test_mixtures_of_one_row_answer_as_the_reference_does(tmp_path: Path, batching: bool) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    adapters = {f"a{i}": tiny_adapter(tmp_path / f"a{i}", folder, seed=i, **spec) for i, spec in enumerate(ADAPTERS)}
    kinds = []
    for routing in ("arrow", "fixed"):
        modules = linear_modules(str(folder))
        prepare_mixture(Blend(routing, {}), adapters, modules, tmp_path / routing, max_rank=64)
        kinds.append(Adapter.load(tmp_path / routing))
    attention = ATTENTION if batching else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    runner = BatchRunner(model, batching=batching)
    parts = [Part(prompt, 0, kind, runner.caches(kind)) for kind in kinds for prompt in PROMPTS]
    fixed = kinds[1]
    assert isinstance(fixed.mixture, FixedRouting)
    sent = [{"a0": 1.5, "a1": -0.5}, {"a2": 1.0}]
    for weights in sent:
        constant = fixed.mixture.gates(checked_weights(weights, fixed.mixture.adapter_names, "fixed"))
        parts.append(Part(PROMPTS[0], 0, fixed, runner.caches(fixed), constant=constant))
    logits = runner.run(parts)
    for weights, found in zip(sent, logits[-2:], strict=True):
        expected = OnePassReference.load(load_model(folder), tmp_path / "fixed", weights).logits(PROMPTS[0])
        torch.testing.assert_close(found[-1], expected[-1], atol=1e-3, rtol=0)
    for number, (routing, prompt) in enumerate((name, each) for name in ("arrow", "fixed") for each in PROMPTS):
        expected = OnePassReference.load(load_model(folder), tmp_path / routing).logits(prompt)
        torch.testing.assert_close(logits[number][-1], expected[-1], atol=1e-3, rtol=0)
