"""The served engine against PEFT's X-LoRA in float32: the same greedy tokens, and logits to 1e-3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from xloom.mixtures.linear_router import save_linear_router
from xloom.mixtures.reference import OnePassReference
from xloom.protocol import AdapterRef, XloomError

from ..models import (
    ADAPTERS,
    linear_router,
    load_model,
    peft_arrow,
    peft_greedy,
    peft_logits,
    peft_lora,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
    tiny_model,
)
from .composing import composed
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


EQUAL: tuple[dict[str, Any], ...] = tuple(  # as PEFT's Arrow wants them
    {"rank": 4, "alpha": alpha, "targets": ("q_proj", "v_proj", "down_proj"), "leading": 4.0} for alpha in (8, 12, 5)
)


def adapters(folder: Path, model: Path, specs: Sequence[dict[str, Any]]) -> dict[str, Path]:
    return {
        name: tiny_adapter(folder / name, model, seed=20 + number, **spec)
        for number, (name, spec) in enumerate(zip(("code", "docs", "maths"), specs, strict=False))
    }


def assert_reference(engine: Engine, answer: Answer, prepared: Path, weights: dict[str, float] | None = None) -> None:
    reference = OnePassReference.load(load_model(engine.model), prepared, weights)
    tokens = reference.greedy(PROMPT, NEW_TOKENS)
    assert_same(answer, tokens, reference.logits(PROMPT + tokens)[len(PROMPT) - 1 : -1])


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0)])
def test_arrow_equals_peft(served: tuple[Engine, Path], top_k: int, temperature: float) -> None:
    engine, folder = served
    name = f"arrow-{top_k}"
    held = adapters(folder / name, engine.model, EQUAL)
    options = {"top_k": top_k, "temperature": temperature}
    ref = engine.mixture(name, "arrow", held, folder / f"{name}-prepared", **options)
    answer = engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
    oracle = peft_arrow(engine.model, list(held.values()), top_k, temperature)
    tokens = peft_greedy(oracle, PROMPT, NEW_TOKENS)
    assert_same(answer, tokens, peft_logits(oracle, PROMPT + tokens)[len(PROMPT) - 1 : -1])
    assert answer.tokens != engine.generate(PROMPT, max_tokens=NEW_TOKENS).tokens


@pytest.mark.parametrize("routing", ["arrow", "fixed", "linear"])
def test_each_kind_over_other_ranks_and_targets_equals_the_reference(served: tuple[Engine, Path], routing: str) -> None:
    engine, folder = served
    name = f"unequal-{routing}"
    held, prepared = adapters(folder / name, engine.model, ADAPTERS), folder / f"{name}-prepared"
    if routing == "linear":
        save_linear_router(folder / name, linear_router(engine.model, held, top_k=2))
        ref = engine.linear(name, folder / name, prepared)
    else:
        ref = engine.mixture(name, routing, held, prepared, **({"top_k": 2} if routing == "arrow" else {}))
    answer = engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
    assert_reference(engine, answer, prepared)


@pytest.mark.parametrize("routing", ["linear", "xlora"])
def test_what_compose_wrote_is_served_as_it_was_trained(served: tuple[Engine, Path], routing: str) -> None:
    engine, folder = served
    name = f"composed-{routing}"
    specs = (ADAPTERS[0], ADAPTERS[0] | {"rank": 4, "rslora": True})
    held, prepared = adapters(folder / name, engine.model, specs), folder / f"{name}-prepared"
    written = composed(engine.model, held, routing, folder / name)
    ref = (engine.linear if routing == "linear" else engine.bundle)(name, written, prepared)
    answer = engine.generate(PROMPT, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
    if routing == "linear":
        assert_reference(engine, answer, prepared)
    else:
        oracle = peft_xlora(engine.model, written)
        tokens = peft_greedy(oracle, PROMPT, NEW_TOKENS)
        assert_same(answer, tokens, peft_logits(oracle, PROMPT + tokens)[len(PROMPT) - 1 : -1])
    even = engine.mixture(f"{name}-even", "fixed", held, folder / f"{name}-even")
    best = answer.tokens[0]
    without = engine.generate(PROMPT, even, max_tokens=1, logprobs=CANDIDATES).scores[0]
    assert abs(answer.scores[0][best] - without.get(best, 0.0)) > 0.01  # the router matters


@pytest.fixture(scope="module")
def fixed(served: tuple[Engine, Path]) -> tuple[Engine, AdapterRef, dict[str, Path], Path]:
    engine, folder = served
    held, prepared = adapters(folder / "fixed", engine.model, ADAPTERS), folder / "fixed-prepared"
    return engine, engine.mixture("fixed", "fixed", held, prepared), held, prepared


Fixed = tuple[Engine, AdapterRef, dict[str, Path], Path]


def test_weights_of_a_request_are_its_gates(fixed: Fixed) -> None:
    engine, ref, held, prepared = fixed
    weights = {"code": 1.5, "maths": -0.5}
    answer = engine.generate(PROMPT, ref, weights=weights, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
    assert_reference(engine, answer, prepared, weights)
    alone = engine.generate(PROMPT, ref, weights={"docs": 1.0}, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
    oracle = peft_lora(engine.model, held["docs"])  # rsLoRA
    tokens = peft_greedy(oracle, PROMPT, NEW_TOKENS)
    assert_same(alone, tokens, peft_logits(oracle, PROMPT + tokens)[len(PROMPT) - 1 : -1])


def test_requests_that_differ_in_weights_alone_never_share_pages(fixed: Fixed) -> None:
    engine, ref, _, _ = fixed
    prompt = [3 + (7 * place) % 200 for place in range(100)]
    mean = dict.fromkeys(("code", "docs", "maths"), 1 / 3)  # the mixture's own
    cached = [
        engine.generate(prompt, ref, weights=weights, max_tokens=2).cached
        for weights in ({"code": 1.0}, {"docs": 1.0}, None, {"code": 1.0}, mean)
    ]
    assert cached[:3] == [0, 0, 0]
    assert min(cached[3:]) >= 64


@pytest.mark.parametrize("weights", [{"poems": 1.0}, {"code": float("nan")}, {}])
def test_wrong_weights_are_refused(fixed: Fixed, weights: dict[str, float]) -> None:
    engine, ref, _, _ = fixed
    with pytest.raises(XloomError) as failure:
        engine.generate(PROMPT, ref, weights=weights)
    assert failure.value.code == "invalid_weights"


def test_weights_where_there_is_no_mixture_are_refused(served: tuple[Engine, Path]) -> None:
    with pytest.raises(XloomError) as failure:
        served[0].generate(PROMPT, weights={"code": 1.0})
    assert failure.value.code == "invalid_weights"


def test_all_kinds_in_one_batch_answer_as_each_alone(fixed: Fixed, served: tuple[Engine, Path]) -> None:
    engine, ref, held, _ = fixed
    folder = served[1]
    arrow = engine.mixture("crowd-arrow", "arrow", held, folder / "crowd-arrow-prepared", top_k=2)
    blend = engine.bundle("crowd-blend", tiny_bundle(folder / "crowd", engine.model, seed=3), folder / "crowd-prepared")
    asked: list[tuple[AdapterRef | None, dict[str, float] | None]] = [(None, None), (arrow, None), (blend, None)]
    asked += [(ref, {"code": 0.1 * number, "docs": 1 - 0.1 * number}) for number in range(12)]
    asked += [(arrow, None), (ref, None), (None, None), (blend, None)]
    prompts = [
        [5 + (number * 31 + 7 * place) % 200 for place in range(20 + 5 * number)] for number in range(len(asked))
    ]
    alone = [engine.generate(prompt, ref, weights=w).tokens for prompt, (ref, w) in zip(prompts, asked, strict=True)]
    started = [engine.start(prompt, ref, weights=w) for prompt, (ref, w) in zip(prompts, asked, strict=True)]
    assert [answer.result(180).tokens for answer in started] == alone
