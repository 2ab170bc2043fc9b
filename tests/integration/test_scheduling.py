"""Scheduling never changes answers: chunked prefill, prefix caching and preemption against an unconstrained run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from xloom.protocol import AdapterRef

from ..models import ADAPTERS, tiny_adapter, tiny_bundle, tiny_model
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


def test_chunked_prefill_prefix_caching_and_preemption_give_the_same_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "model", "llama")

    free = Engine(model, paged_attention={"enable_prefix_caching": False, "max_blocks": 4096})
    try:
        kinds = adapters_of(free, tmp_path / "free")
        expected = run_all(free, kinds)
    finally:
        free.close()

    tight = Engine(
        model,
        max_model_len=256,  # a pair of that length takes 17 pages
        max_num_seqs=REQUESTS,
        paged_attention={"block_size": 32, "max_blocks": 24},  # 768 tokens for 16 requests of up to 203
        extra_args={"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    )
    try:
        kinds = adapters_of(tight, tmp_path / "tight")
        first = run_all(tight, kinds)
        again = run_all(tight, kinds)  # now with what is left in the prefix cache
        stats = tight.backend.stats()
    finally:
        tight.close()

    assert [answer.tokens for answer in first] == [answer.tokens for answer in expected]
    assert [answer.tokens for answer in again] == [answer.tokens for answer in expected]
    assert all(len(answer.tokens) == NEW_TOKENS for answer in expected)
    assert any(answer.cached for answer in again)  # the prefix cache was used
    assert stats.preemptions > 0  # and requests were preempted
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
    by_kind = [answer.tokens for answer in expected[:4]]
    assert len({tuple(tokens) for tokens in by_kind}) == 4
