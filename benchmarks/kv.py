"""What KV pages are worth: sessions in the same memory with and without them, waste, shared prompts, 100 sessions.

Paged: vLLM through its backend, its pages limited to a number of bytes. Contiguous: transformers' `StaticCache`, one
of the greatest length for each session, really allocated and filled by the model until the same bytes are used up.
Sessions are the sample corpus' held-out documents, so that their lengths are mixed as real ones are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from xloom.protocol import EngineStats
from xloom.sample.corpus import documents
from xloom.settings import SAMPLE, EngineSettings, ModelSettings, PagedAttentionSettings
from xloom.vllm.engine.arguments import page_bytes
from xloom.vllm.engine.backend import VLLMBackend

from .machine import machine
from .sessions import Burst, Driver, Session
from .tables import Table, markdown

MIB = 2**20
PAGE = 32  # tokens: what vLLM's CPU attention needs
MAX_LEN = 2048  # tokens: the sample model's own
NEW_TOKENS = 64
LONGEST_PROMPT = 1024
SYSTEM_TOKENS, QUESTION_TOKENS, QUESTIONS = 768, 32, 16
console = Console(stderr=True)


@dataclass
class Peak:
    """The moment at which most sessions held pages."""

    sessions: int = 0
    tokens: int = 0  # of those sessions, keys and values of which are kept
    pages: int = 0
    most_pages: int = 0  # in use at any moment
    samples: list[float] = field(default_factory=list)  # used share of the pages while sessions wait

    def take(self, sessions: Sequence[Session], stats: EngineStats) -> None:
        """Look at one step. Steps at which a preempted session waits without pages can't be the peak."""
        held = [session.held for session in sessions if session.held]
        self.most_pages = max(self.most_pages, stats.kv_pages_used)
        if stats.waiting:
            self.samples.append(stats.kv_occupancy)
        if self.sessions < len(held) <= stats.running:
            self.sessions, self.tokens, self.pages = len(held), sum(held), stats.kv_pages_used


@dataclass
class Contiguous:
    """What fits without pages."""

    sessions: int
    tokens: int
    bytes: int


def prompts_of(sample: Path, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of mixed lengths: held-out documents of all domains, cut at `LONGEST_PROMPT` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sample / "base")
    rng = random.Random(seed)
    held_out = [document for document in documents() if document.held_out]
    domains = sorted({document.domain for document in held_out})
    by_domain = {domain: [each for each in held_out if each.domain == domain] for domain in domains}
    chosen = [rng.choice(by_domain[domains[number % len(domains)]]) for number in range(count)]
    rng.shuffle(chosen)
    texts = [document.text[: 8 * LONGEST_PROMPT] for document in chosen]
    return [
        list(tokenizer(text, add_special_tokens=False)["input_ids"])[:LONGEST_PROMPT]  # the text writes its own
        for text in texts
    ]


def engine_settings(pages: int, sessions: int, *, prefix_caching: bool) -> EngineSettings:
    """An engine whose only limit is its pages."""
    return EngineSettings(
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=sessions,
        paged_attention=PagedAttentionSettings(block_size=PAGE, max_blocks=pages, enable_prefix_caching=prefix_caching),
    )


async def start(sample: Path, settings: EngineSettings) -> VLLMBackend:
    return await VLLMBackend.load(ModelSettings(source=str(sample / "base")), settings, xlora=False, max_lora_rank=8)


@dataclass
class Shared:
    """Sessions with one system prompt: their pages, and each one's time to the first token beside that of others."""

    pages: int
    shared_ms: float  # the system prompt has been seen
    fresh_ms: float  # another of the same length, never seen


async def measure_shared(driver: Driver, peak_of: Callable[[], Peak], rng: random.Random) -> Shared:
    """After one session that brings the system prompt: seen and unseen prompts in turn, then sessions together."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(5, 4000) for _ in range(count)]

    async def first_ms(system: list[int]) -> float:
        return (await driver.run([system + tokens(QUESTION_TOKENS)], [8])).median_first_token_ms

    system = tokens(SYSTEM_TOKENS)
    await first_ms(system)
    times = [(await first_ms(system), await first_ms(tokens(SYSTEM_TOKENS))) for _ in range(QUESTIONS)]
    peak = peak_of()
    await driver.run([system + tokens(QUESTION_TOKENS) for _ in range(QUESTIONS)], [NEW_TOKENS] * QUESTIONS)
    return Shared(peak.most_pages, *(statistics.median(each) for each in zip(*times, strict=True)))


@dataclass
class Paged:
    """What vLLM did with the pages."""

    peak: Peak
    total_pages: int
    preemptions: int
    burst: Burst
    shared: Shared


async def measure_paged(
    sample: Path, pages: int, prompts: list[list[int]], max_seqs: int, *, prefix_caching: bool
) -> Paged:
    """All sessions at once on one engine; then those with a shared prompt."""
    backend = await start(sample, engine_settings(pages, max_seqs, prefix_caching=prefix_caching))
    peak = Peak()

    def look(sessions: Sequence[Session]) -> None:
        peak.take(sessions, backend.stats())

    def anew() -> Peak:
        nonlocal peak
        peak = Peak()
        return peak

    driver = Driver(backend, look)
    try:
        await driver.run([[5] * 32] * 2, [4, 4])  # once for nothing
        crowd = anew()
        burst = await driver.run(prompts, [NEW_TOKENS] * len(prompts))
        preemptions = backend.stats().preemptions
        shared = await measure_shared(driver, anew, random.Random(1))
    finally:
        await driver.close()
    return Paged(crowd, pages, preemptions, burst, shared)


def measure_contiguous(sample: Path, budget: int, prompts: list[list[int]]) -> Contiguous:
    """Sessions whose caches of the greatest length fit the bytes: each is allocated and filled with its prompt."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(sample / "base", dtype=torch.float32)
    model.eval()
    caches, tokens, used = [], 0, 0
    with torch.no_grad():
        for prompt in prompts:
            cache = StaticCache(config=model.config, max_cache_len=MAX_LEN)
            model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            if used + size > budget:
                break
            caches.append(cache)
            used += size
            tokens += len(prompt) + NEW_TOKENS  # at its end: the most it ever uses
    return Contiguous(len(caches), tokens, used)


def tables(
    budget: int, paged: Paged, cached: Paged, contiguous: Contiguous, hundred: Burst, preempted: int
) -> list[Table]:
    """The result as the tables of the report."""
    lengths = sorted(len(session.request.prompt_token_ids) for session in paged.burst.sessions)
    peak = paged.peak
    slots = peak.pages * PAGE
    reserved = contiguous.sessions * MAX_LEN
    full = statistics.mean(peak.samples) if peak.samples else peak.pages / paged.total_pages
    with_cache, without = cached.shared, paged.shared
    return [
        {
            "title": f"Sessions in {budget // MIB} MiB of keys and values",
            "columns": ["", "contiguous", "paged", "paged ÷ contiguous"],
            "rows": [
                [
                    "concurrent sessions", contiguous.sessions, peak.sessions,
                    f"{peak.sessions / contiguous.sessions:.1f}×",
                ],
                [
                    "tokens kept", f"{contiguous.tokens:,}", f"{peak.tokens:,}",
                    f"{peak.tokens / contiguous.tokens:.1f}×",
                ],
                [
                    "of the reserved slots, used", f"{contiguous.tokens / reserved:.0%}", f"{peak.tokens / slots:.0%}",
                    "",
                ],
                [
                    "of the reserved slots, wasted", f"{1 - contiguous.tokens / reserved:.0%}",
                    f"{1 - peak.tokens / slots:.0%}", "",
                ],
                ["of all memory, in use while sessions wait", f"{contiguous.bytes / budget:.0%}", f"{full:.0%}", ""],
            ],
            "notes": f"Prompts of {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]}) and "
            f"{NEW_TOKENS} new ones; contiguous caches hold {MAX_LEN} tokens and are counted at each session's full "
            f"length, pages hold {PAGE} and are counted at the step with most sessions. Prefix caching off. "
            f"{len(lengths)} sessions were submitted, {paged.burst.complete} came to their full length, "
            f"with {paged.preemptions} preemptions. ADR-008 expects 5 to 10 times the users, and 85-95% of the memory "
            "used where it was 40-60%: the shorter sessions are beside the greatest length, the larger the difference.",
        },
        {
            "title": f"A shared system prompt of {SYSTEM_TOKENS} tokens",
            "columns": ["", "without prefix caching", "with", "with ÷ without"],
            "rows": [
                [
                    f"pages of {QUESTIONS} sessions at once", without.pages, with_cache.pages,
                    f"{with_cache.pages / without.pages:.2f}",
                ],
                [
                    "time to first token (ms)", f"{with_cache.fresh_ms:.1f}", f"{with_cache.shared_ms:.1f}",
                    f"{with_cache.shared_ms / with_cache.fresh_ms:.2f}",
                ],
            ],
            "notes": f"Each adds {QUESTION_TOKENS} tokens of its own. Pages are the most in use at one step, of "
            f"two engines. Times are medians of {QUESTIONS} sessions one after the other on one engine with prefix "
            "caching: a prompt it has seen and one it has not in turn.",
        },
        {
            "title": "100 concurrent sessions on one replica",
            "columns": ["sessions", "complete", "preemptions", "tokens/s", "first token (ms): median", "slowest"],
            "rows": [
                [
                    len(hundred.sessions), hundred.complete, preempted, f"{hundred.tokens_per_second:,.0f}",
                    f"{hundred.median_first_token_ms:,.0f}", f"{max(hundred.first_token_ms):,.0f}",
                ]
            ],
            "notes": f"All submitted together; {NEW_TOKENS} new tokens each, the pages of the default settings "
            f"({4096 * 16 // PAGE} of {PAGE} tokens).",
        },
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv",
        description=__doc__,
        epilog="example: python -m benchmarks.kv --mib 64 --json kv.json",
    )
    parser.add_argument("--sample", type=Path, default=SAMPLE, help="folder with base/ (the shipped one)")
    parser.add_argument("--mib", type=int, default=64, help="memory for keys and values (%(default)s)")
    parser.add_argument("--sessions", type=int, default=160, help="submitted to the paged engine (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    found = machine()
    budget = options.mib * MIB
    from transformers import AutoConfig

    pages = budget // page_bytes(AutoConfig.from_pretrained(options.sample / "base"), PAGE, "float32")
    prompts = prompts_of(options.sample, options.sessions)
    console.print("contiguous caches")
    contiguous = measure_contiguous(options.sample, budget, prompts)
    console.print(f"{pages} pages, without prefix caching")
    paged = asyncio.run(measure_paged(options.sample, pages, prompts, options.sessions, prefix_caching=False))
    console.print("100 sessions and prefix caching")
    default = PagedAttentionSettings()
    cached = asyncio.run(
        measure_paged(
            options.sample,
            default.max_blocks * default.block_size // PAGE,
            prompts_of(options.sample, 100, seed=2),
            128,
            prefix_caching=True,
        )
    )
    result: dict[str, Any] = {
        "name": "kv",
        "machine": found,
        "tables": tables(budget, paged, cached, contiguous, cached.burst, cached.preemptions),
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    for table in result["tables"]:
        print(f"\n{markdown(table)}")


if __name__ == "__main__":
    main()
