"""The served engine against PEFT's X-LoRA in float32: the same greedy tokens, and logits to 1e-3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xloom.protocol import XloomError

from ..models import (
    ADAPTERS,
    load_model,
    peft_greedy,
    peft_logits,
    peft_lora,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
    tiny_model,
)
from .harness import Answer, Engine

PROMPT = list(range(40, 75))
NEW_TOKENS = 12
CANDIDATES = 8

# What varies beside the architecture; each bundle mixes adapters of different rank, alpha, rsLoRA and targets.
GRID: dict[str, dict[str, Any]] = {
    "default": {},
    "deep": {"depth": 2},
    "one-gate-a-token": {"layerwise": False},
    "deep-one-gate-a-token": {"depth": 2, "layerwise": False},
    "no-softmax": {"softmax": False},
    "temperature": {"temperature": 0.3},
    "top-1": {"top_k": 1},
    "top-2": {"top_k": 2, "depth": 2},
    "top-2-softmax": {"top_k": 2, "softmax_topk": True},
    "global-weight": {"global_scaling_weight": 0.5},
    "adapters-in-scaling-pass": {"scaling_pass_value": 0.3},
}


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param)
    engine = Engine(
        model,
        compile=request.param == "llama",
        extra_args={"logprobs_mode": "raw_logits"},
        max_adapters=len(GRID) + 4,
    )
    yield engine, folder
    engine.close()


def assert_same(answer: Answer, tokens: list[int], logits: torch.Tensor) -> None:
    """`logits [NEW_TOKENS, vocabulary]` are the oracle's at the generated positions."""
    assert answer.tokens == tokens
    assert len(answer.scores) == len(tokens)
    for position, candidates in enumerate(answer.scores):
        assert len(candidates) >= CANDIDATES
        for token, logit in candidates.items():
            assert logit == pytest.approx(logits[position, token].item(), abs=1e-3)


@pytest.mark.parametrize("variant", GRID)
def test_served_tokens_and_logits_equal_peft(served: tuple[Engine, Path], variant: str) -> None:
    engine, folder = served
    bundle = tiny_bundle(folder / variant, engine.model, seed=3, **GRID[variant])
    ref = engine.bundle(variant, bundle, folder / f"{variant}-prepared")

    answer = engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)

    oracle = peft_xlora(engine.model, bundle)
    tokens = peft_greedy(oracle, PROMPT, NEW_TOKENS)
    logits = peft_logits(oracle, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert_same(answer, tokens, logits)
    assert answer.tokens != engine.generate(PROMPT, max_tokens=NEW_TOKENS).tokens  # the mixture matters


def test_plain_adapter_and_base_equal_peft(served: tuple[Engine, Path]) -> None:
    engine, folder = served
    adapter = tiny_adapter(folder / "plain", engine.model, seed=9, **ADAPTERS[0])
    ref = engine.adapter("plain", adapter, folder / "plain-prepared")
    for oracle, named in ((load_model(engine.model), None), (peft_lora(engine.model, adapter), ref)):
        answer = engine.generate(PROMPT, named, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
        tokens = peft_greedy(oracle, PROMPT, NEW_TOKENS)
        logits = peft_logits(oracle, PROMPT + tokens)[len(PROMPT) - 1 : -1]
        assert_same(answer, tokens, logits)


def test_what_the_engine_would_leave_out_of_an_adapter_is_refused_by_name(served: tuple[Engine, Path]) -> None:
    engine, folder = served
    adapter = tiny_adapter(folder / "headed", engine.model, targets=("q_proj", "lm_head"))
    with pytest.raises(XloomError, match="lm_head") as caught:
        engine.adapter("headed", adapter, folder / "headed-prepared")
    assert caught.value.code == "not_applied"
    assert "q_proj" not in caught.value.message


def test_overrides_change_the_mixture_as_if_the_bundle_said_so(served: tuple[Engine, Path]) -> None:
    engine, folder = served
    bundle = tiny_bundle(folder / "plainly", engine.model, seed=3)
    said = tiny_bundle(folder / "said", engine.model, seed=3, top_k=1, temperature=0.5)
    overridden = engine.bundle("overridden", bundle, folder / "overridden-prepared", top_k=1, temperature=0.5)
    oracle = peft_xlora(engine.model, said)
    assert engine.generate(PROMPT, overridden, max_tokens=NEW_TOKENS).tokens == peft_greedy(oracle, PROMPT, NEW_TOKENS)


@pytest.mark.parametrize(
    "options",
    [{"mixing_mode": "gated"}, {"mixing_mode": "concatenate", "projection": True}],
    ids=["gated", "learned-projection"],
)
def test_modes_peft_lacks_equal_the_plain_torch_reference(served: tuple[Engine, Path], options: dict[str, Any]) -> None:
    from xloom.mixtures.reference import reference_greedy, reference_logits

    engine, folder = served
    name = str(options["mixing_mode"])
    bundle = tiny_bundle(folder / name, engine.model, seed=5, **options)
    prepared = folder / f"{name}-prepared"
    ref = engine.bundle(name, bundle, prepared, mixing_mode=options["mixing_mode"])
    answer = engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)

    base = load_model(engine.model)
    tokens = reference_greedy(base, prepared, PROMPT, NEW_TOKENS)
    logits = reference_logits(base, prepared, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert_same(answer, tokens, logits)


def test_concatenate_without_a_projection_equals_additive(served: tuple[Engine, Path]) -> None:
    engine, folder = served
    bundle = tiny_bundle(folder / "both", engine.model, seed=3)
    answers = [
        engine.generate(
            PROMPT,
            engine.bundle(f"{mode}-both", bundle, folder / f"{mode}-both", mixing_mode=mode),
            max_tokens=NEW_TOKENS,
        ).tokens
        for mode in ("additive", "concatenate")
    ]
    assert answers[0] == answers[1]
