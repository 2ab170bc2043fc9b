"""`vllm` and `transformers` in float32: the same greedy tokens, and log-probabilities to 1e-3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from xloom.protocol import AdapterRef

from ..models import ADAPTERS, tiny_adapter, tiny_bundle
from .conftest import usable
from .served import Answer, Served

PROMPTS = [list(range(40, 75)), [256, 5, 9, 200], list(range(100, 160))]
NEW_TOKENS = 16
CANDIDATES = 5
TOLERANCE = 1e-3


@dataclass
class Pair:
    """The same model, adapter and bundle in both."""

    vllm: Served
    transformers: Served
    refs: dict[str, AdapterRef | None]


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    classes = usable("vllm"), usable("transformers")
    folder = tmp_path_factory.mktemp("parity")
    adapter = tiny_adapter(folder / "plain", model, seed=9, **ADAPTERS[0])
    bundle = tiny_bundle(folder / "blend", model, seed=3, depth=2)
    sparse = tiny_bundle(folder / "sparse", model, seed=5, top_k=1, temperature=0.5)
    engines: list[Served] = []
    try:
        for found in classes:
            engine = Served(found, model, xlora=True)
            engines.append(engine)
            refs = {
                "base": None,
                "adapter": engine.adapter("plain", adapter),
                "xlora": engine.bundle("blend", bundle),
                "xlora-top-1": engine.bundle("sparse", sparse),
            }
        yield Pair(engines[0], engines[1], refs)
    finally:
        for engine in engines:
            engine.close()


def assert_alike(ours: Answer, theirs: Answer) -> None:
    assert ours.tokens == theirs.tokens
    assert len(ours.logprobs) == len(theirs.logprobs) == NEW_TOKENS
    for token, mine, other in zip(ours.tokens, ours.logprobs, theirs.logprobs, strict=True):
        assert token in mine
        assert token in other
        shared = mine.keys() & other.keys()
        assert len(shared) >= CANDIDATES - 1  # the last candidate may be a tie
        for candidate in shared:
            assert mine[candidate] == pytest.approx(other[candidate], abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["base", "adapter", "xlora", "xlora-top-1"])
def test_both_give_the_same_tokens_and_log_probabilities(pair: Pair, kind: str) -> None:
    for prompt in PROMPTS:
        ref = pair.refs[kind]
        ours = pair.vllm.generate(prompt, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
        theirs = pair.transformers.generate(prompt, ref, max_tokens=NEW_TOKENS, logprobs=CANDIDATES)
        assert_alike(ours, theirs)


@pytest.mark.parametrize("kind", ["base", "adapter", "xlora"])
def test_both_agree_in_a_mixed_batch(pair: Pair, kind: str) -> None:
    def crowd(engine: Served) -> list[list[int]]:
        started = [engine.start(prompt, pair.refs[kind], max_tokens=NEW_TOKENS)[1] for prompt in PROMPTS]
        return [future.result(180).tokens for future in started]

    assert crowd(pair.vllm) == crowd(pair.transformers)
