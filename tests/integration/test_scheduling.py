"""Scheduling never changes answers: chunked prefill, prefix caching and preemption against an unconstrained run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xloom.mixtures.linear_router import save_linear_router
from xloom.mixtures.reference import OnePassReference, Reference
from xloom.protocol import AdapterRef

from ..models import ADAPTERS, linear_router, load_model, tiny_adapter, tiny_bundle, tiny_model
from .harness import Answer, Engine

REQUESTS = 16
NEW_TOKENS = 48
SHARED_PREFIX = list(range(5, 74))  # over two pages: later requests of a kind find it in the prefix cache


def prompts() -> list[list[int]]:
    """Prompts of 80 to 155 tokens, every other one with the shared prefix."""
    made = []
    for number in range(REQUESTS):
        own = [(7 * number + 3 * position) % 250 for position in range(80 + 5 * number)]
        made.append((SHARED_PREFIX + own)[: 80 + 5 * number] if number % 2 else own)
    return made


def adapters_of(engine: Engine, folder: Path) -> list[AdapterRef | None]:
    bundle = tiny_bundle(folder / "bundle", engine.model, seed=3, depth=2)
    other = tiny_bundle(folder / "other", engine.model, seed=8, top_k=2)
    adapter = tiny_adapter(folder / "adapter", engine.model, seed=9, **ADAPTERS[0])
    return [
        None,
        engine.adapter("adapter", adapter, folder / "adapter-prepared"),
        engine.bundle("bundle", bundle, folder / "bundle-prepared"),
        engine.bundle("other", other, folder / "other-prepared"),
    ]


def run_all(engine: Engine, kinds: Sequence[AdapterRef | None]) -> list[Answer]:
    """All requests at once, kinds interleaved."""
    started: list[Future[Answer]] = [
        engine.start(prompt, kinds[number % len(kinds)], max_tokens=NEW_TOKENS)
        for number, prompt in enumerate(prompts())
    ]
    return [future.result(300) for future in started]


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Steps of 64 tokens, and room for few requests."""
    engine = Engine(
        tiny_model(tmp_path_factory.mktemp("tight") / "model", "llama"),
        max_model_len=256,  # a pair of that length takes 17 pages
        max_num_seqs=2 * REQUESTS,
        max_adapters=12,
        paged_attention={"block_size": 32, "max_blocks": 24},  # 768 tokens for 16 requests of up to 203
        extra_args={"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    )
    yield engine
    engine.close()


def test_chunked_prefill_prefix_caching_and_preemption_give_the_same_tokens(tight: Engine, tmp_path: Path) -> None:
    free = Engine(tight.model, paged_attention={"enable_prefix_caching": False, "max_blocks": 4096})
    try:
        kinds = adapters_of(free, tmp_path / "free")
        expected = run_all(free, kinds)
    finally:
        free.close()

    kinds = adapters_of(tight, tmp_path / "tight")
    first = run_all(tight, kinds)
    again = run_all(tight, kinds)  # now with what is left in the prefix cache
    stats = tight.backend.stats()

    assert [answer.tokens for answer in first] == [answer.tokens for answer in expected]
    assert [answer.tokens for answer in again] == [answer.tokens for answer in expected]
    assert all(len(answer.tokens) == NEW_TOKENS for answer in expected)
    assert any(answer.cached for answer in again)  # the prefix cache was used
    assert stats.preemptions > 0  # and requests were preempted
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
    by_kind = [answer.tokens for answer in expected[:4]]
    assert len({tuple(tokens) for tokens in by_kind}) == 4


WEIGHTS = {"code": 1.5, "maths": -0.5}


def mixtures_of(engine: Engine, folder: Path) -> dict[str, tuple[AdapterRef, Path]]:
    """One of each kind, and where it is prepared."""
    specs = zip(("code", "docs", "maths"), ADAPTERS, strict=True)
    held = {name: tiny_adapter(folder / name, engine.model, **spec, strength=0.3) for name, spec in specs}
    bundle = tiny_bundle(folder / "bundle", engine.model, seed=3, depth=2, top_k=2)
    save_linear_router(folder, linear_router(engine.model, held))
    single = {"one": {"routing_passes": 1}, "lagged": {"routing_passes": 1, "prefill": "lagged"}}
    prepared = {name: folder / f"{name}-prepared" for name in ("xlora", *single, "arrow", "fixed", "linear")}
    refs = {name: engine.bundle(name, bundle, prepared[name], **single.get(name, {})) for name in ("xlora", *single)}
    refs |= {name: engine.mixture(name, name, held, prepared[name]) for name in ("arrow", "fixed")}
    refs["linear"] = engine.linear("linear", folder, prepared["linear"])
    return {name: (ref, prepared[name]) for name, ref in refs.items()} | {"weights": (refs["fixed"], prepared["fixed"])}


def reference_gates(model: Any, kind: str, prepared: Path, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    ids = prompt + tokens[:-1]
    if kind in ("xlora", "one", "lagged"):
        return Reference.load(model, prepared).gates(ids, len(prompt))
    return OnePassReference.load(model, prepared, WEIGHTS if kind == "weights" else None).gates_of(ids)


@pytest.fixture(scope="module")
def mixtures(tight: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AdapterRef, Path]]:
    return mixtures_of(tight, tmp_path_factory.mktemp("mixtures"))


def test_gates_told_are_the_references_under_the_same_stress(
    tight: Engine, mixtures: dict[str, tuple[AdapterRef, Path]]
) -> None:
    model = load_model(tight.model)
    before = tight.backend.stats().preemptions

    def start(kind: str, prompt: list[int], layers: bool) -> Future[Answer]:
        weights = WEIGHTS if kind == "weights" else None
        return tight.start(prompt, mixtures[kind][0], weights=weights, layer_gates=layers, max_tokens=20)

    def check(kind: str, prompt: list[int], layers: bool, answer: Answer) -> int:
        expected = reference_gates(model, kind, mixtures[kind][1], prompt, answer.tokens)
        assert len(answer.gates) == len(answer.tokens) == 20
        assert_gates(answer, expected, len(prompt) - 1, layers=layers)
        return len(prompt) - 1 - answer.gates[0].prompt_tokens

    asked = list(zip(list(mixtures) * 2, prompts(), [True, False, False] * 5, strict=False))
    started = [start(*each) for each in asked]
    for each, future in zip(asked, started, strict=True):
        check(*each, future.result(300))
    assert tight.backend.stats().preemptions > before

    for kind in ("xlora", "arrow", "fixed"):  # one after another, with what is left in the prefix cache
        cached = [check(kind, prompts()[1], False, start(kind, prompts()[1], False).result(300)) for _ in range(2)]
        assert cached[1] >= 64


def test_requests_of_all_kinds_and_weights_side_by_side_are_answered_as_alone(
    tight: Engine, mixtures: dict[str, tuple[AdapterRef, Path]], tmp_path: Path
) -> None:
    """Twelve weights over three prompts: requests that differ in weights alone would share pages, if they could."""
    adapter = tiny_adapter(tmp_path / "adapter", tight.model, seed=9, **ADAPTERS[0])
    plain = tight.adapter("beside", adapter, tmp_path / "prepared")
    one_row = [None, plain, mixtures["arrow"][0], mixtures["linear"][0], mixtures["xlora"][0]]
    asked: list[tuple[list[int], AdapterRef | None, dict[str, float] | None]] = [
        (prompt, one_row[number % len(one_row)], None) for number, prompt in enumerate([*prompts(), *prompts()[:4]])
    ]
    for number in range(12):
        weights = {"code": number / 4 - 1, "docs": 1.5 - number / 6, "maths": number % 3 / 2}
        asked.append((prompts()[9 + 2 * (number % 3)], mixtures["fixed"][0], weights))

    def start(prompt: list[int], kind: AdapterRef | None, weights: dict[str, float] | None) -> Future[Answer]:
        return tight.start(prompt, kind, weights=weights, max_tokens=24)

    alone = [start(*each).result(300).tokens for each in asked]
    before = tight.backend.stats().preemptions
    together = [future.result(300).tokens for future in [start(*each) for each in asked]]

    assert together == alone
    assert len(asked) == 32
    assert tight.backend.stats().preemptions > before
    assert len({tuple(tokens) for tokens in alone[-12:]}) > 8  # weights do change the answer
    for number, (prompt, kind, weights) in enumerate(asked[-12:]):
        reference = OnePassReference.load(load_model(tight.model), mixtures["fixed"][1], weights)
        assert kind == mixtures["fixed"][0]
        assert reference.greedy(prompt, 24) == alone[number - 12]


def assert_gates(answer: Answer, expected: torch.Tensor, asked: int, *, layers: bool) -> None:
    """`expected [num_tokens, M, K]`; rows before `asked` are the prompt's."""
    first, modules = answer.gates[0], expected.shape[1]
    assert len(first.adapters) == expected.shape[2]
    tokens = np.stack([np.frombuffer(each.tokens, np.float32) for each in answer.gates])
    assert tokens == pytest.approx(expected[asked:].mean(1).numpy(), abs=1e-3)
    rows = expected[asked - first.prompt_tokens : asked]  # the cache has the beginning, if anything
    assert np.frombuffer(first.prompt, np.float32) == pytest.approx(rows.mean((0, 1)).numpy(), abs=1e-3)
    for each, row in zip(answer.gates, expected[asked:], strict=True):
        if layers:
            told = np.frombuffer(each.layers, np.float32).reshape(2, -1)
            assert told == pytest.approx(row.view(2, modules // 2, -1).mean(1).numpy(), abs=1e-3)
        assert bool(each.layers) == layers
