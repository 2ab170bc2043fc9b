"""What a served engine says of its X-LoRA tokens, against the plain torch reference on the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xloom.mixtures.reference import Reference
from xloom.protocol import BundleFigures, MixtureFigures

from ..models import ADAPTERS, load_model, tiny_adapter, tiny_bundle, tiny_model
from .harness import Engine

PROMPT = list(range(40, 75))
NEW_TOKENS = 12
ROUTED = len(PROMPT) + NEW_TOKENS - 1  # the last token made is sent, not computed

BUNDLES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "one-gate-a-token": {"layerwise": False},
    "top-2": {"top_k": 2, "scaling_pass_value": 0.3},
    "gated": {"mixing_mode": "gated"},
    "one-pass": {},
    "lagged": {},
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "one-pass": {"routing_passes": 1},
    "lagged": {"routing_passes": 1, "prefill": "lagged"},
}
# The scaling sequence's step and the request's own, for the prompt and for each token that follows it; with routing in
# one pass for the prompt at most.
STEPS = {"one-pass": NEW_TOKENS + 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    folder = tmp_path_factory.mktemp("figures")
    engine = Engine(tiny_model(folder / "model", "llama"), max_adapters=8)
    yield engine, folder
    engine.close()


def growth(engine: Engine, tokens: int) -> MixtureFigures:
    """All figures since last asked, which come to so many routed tokens."""
    bundles: list[BundleFigures] = []
    steps, seconds = 0, [0.0, 0.0, 0.0]
    deadline = time.monotonic() + 120
    while sum(bundle.tokens for bundle in bundles) < tokens and time.monotonic() < deadline:
        part = engine.call(engine.backend.mixture())
        if part is not None:
            bundles += part.bundles
            steps += part.steps
            parts = (part.seconds, part.scaling_seconds, part.routing_seconds)
            seconds = [so_far + more for so_far, more in zip(seconds, parts, strict=True)]
    assert engine.call(engine.backend.mixture()) is None
    return MixtureFigures(bundles, steps, *seconds)


@pytest.mark.parametrize("variant", BUNDLES)
def test_figures_are_those_of_the_references_gates_on_the_same_tokens(
    served: tuple[Engine, Path], variant: str
) -> None:
    engine, folder = served
    options = BUNDLES[variant]
    bundle = tiny_bundle(folder / variant, engine.model, seed=3, **options)
    prepared = folder / f"{variant}-prepared"
    ref = engine.bundle(variant, bundle, prepared, **OVERRIDES.get(variant, {}))

    answer = engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS)
    figures = growth(engine, ROUTED)

    (found,) = figures.bundles
    reference = Reference.load(load_model(engine.model), prepared)
    gates = reference.gates(PROMPT + answer.tokens[:-1], len(PROMPT))
    assert (found.name, found.tokens) == (variant, ROUTED)
    means = {name: total / ROUTED for name, total in found.gates.items()}
    expected = dict(zip(reference.routing.adapter_names, gates.mean((0, 1)).tolist(), strict=True))
    assert means == pytest.approx(expected, abs=1e-3)
    shares = (gates / gates.sum(-1, keepdim=True)).nan_to_num()  # a lagged prompt's first token has no gates
    entropy = -shares.xlogy(shares).sum(-1).mean().item()
    assert found.entropy / ROUTED == pytest.approx(entropy, abs=1e-3)
    assert 0 < entropy < math.log(len(expected))
    if variant in ("softmax", "one-gate-a-token"):
        assert sum(means.values()) == pytest.approx(1, abs=1e-4)
    if variant == "lagged":  # a step for each segment of the prompt, none of a scaling sequence
        assert figures.steps > NEW_TOKENS
        assert figures.scaling_seconds == 0
    else:
        assert figures.steps == STEPS.get(variant, 2 * NEW_TOKENS)
        assert 0 < figures.scaling_seconds < figures.seconds
    assert 0 < figures.routing_seconds < figures.seconds - figures.scaling_seconds


def test_tokens_count_as_often_as_they_are_computed(served: tuple[Engine, Path]) -> None:
    engine, folder = served
    ref = engine.bundle("counted", tiny_bundle(folder / "counted", engine.model, seed=4), folder / "counted-prepared")
    prompts = [[(7 * number + position) % 250 for position in range(70 + number)] for number in range(6)]
    for future in [engine.start(prompt, ref, max_tokens=NEW_TOKENS) for prompt in prompts]:
        future.result(180)
    expected = sum(len(prompt) + NEW_TOKENS - 1 for prompt in prompts)
    assert sum(bundle.tokens for bundle in growth(engine, expected).bundles) == expected

    again = engine.generate(prompts[0], ref, max_tokens=NEW_TOKENS)  # its pages are there already
    assert again.cached >= 64
    expected = len(prompts[0]) - again.cached + NEW_TOKENS - 1
    assert sum(bundle.tokens for bundle in growth(engine, expected).bundles) == expected


def test_plain_adapters_and_the_base_model_are_not_counted(served: tuple[Engine, Path]) -> None:
    engine, folder = served
    source = tiny_adapter(folder / "plain", engine.model, seed=9, **ADAPTERS[0])
    plain = engine.adapter("plain", source, folder / "plain-prepared")
    blend = engine.bundle("beside", tiny_bundle(folder / "beside", engine.model, seed=5), folder / "beside-prepared")
    for kind in (plain, None):
        engine.generate(PROMPT, kind, max_tokens=NEW_TOKENS)
        assert engine.call(engine.backend.mixture()) is None

    mixed = [engine.start(PROMPT, kind, max_tokens=NEW_TOKENS) for kind in (plain, blend, None)]
    for future in mixed:
        future.result(180)
    figures = growth(engine, ROUTED)
    assert {bundle.name for bundle in figures.bundles} == {"beside"}
    assert sum(bundle.tokens for bundle in figures.bundles) == ROUTED


def test_of_two_ranks_one_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    model = tiny_model(tmp_path / "model", "llama")
    engine = Engine(model, tensor_parallel_size=2)
    try:
        ref = engine.bundle("blend", tiny_bundle(tmp_path / "bundle", model, seed=3), tmp_path / "prepared")
        running = engine.start(PROMPT, ref, max_tokens=NEW_TOKENS)
        first = engine.call(engine.backend.mixture())  # in the midst of it
        running.result(180)
        tokens = sum(bundle.tokens for bundle in first.bundles) if first is not None else 0
        rest = growth(engine, ROUTED - tokens)
        assert tokens + sum(bundle.tokens for bundle in rest.bundles) == ROUTED
        assert len(engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS).tokens) == NEW_TOKENS  # the ranks are in step
    finally:
        engine.close()
