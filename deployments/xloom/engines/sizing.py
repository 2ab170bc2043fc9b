"""What a GPU's memory goes to, and what is left for KV pages: `xloom doctor --gpu-memory` and docs/sizing.md.

For decoders of Llama's form, with LoRA on all linears. `python -m xloom.engines.sizing docs/sizing.md` writes tables.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xloom.engines.kv_size import pair_pages, request_pages, token_bytes
from xloom.protocol import XloomError

GIB = 1024**3
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks, vLLM 0.32
STEP = 2 * GIB  # left free for a step's activations, CUDA graphs and the CUDA context
WIDTH = 2  # bytes of a number, bfloat16 or float16
PAGE = 16  # tokens


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # embeddings and output share one matrix

    @classmethod
    def of(cls, field: Callable[[str], Any]) -> Shape:
        """From a configuration, whose fields `field` gives, or None. Raises `XloomError` (unknown_shape)."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        given = {name: field(name) for name in names}
        missing = [name for name, value in given.items() if not isinstance(value, int)]
        if missing or field("num_experts") or field("num_local_experts"):
            what = f"its configuration has no {missing[0]}" if missing else "it has experts"
            cure = "docs/sizing.md has the formula; an engine says what it has as it starts."
            raise XloomError("unknown_shape", f"The model's memory can't be reckoned: {what}.", cure)
        hidden, intermediate, layers, heads, vocabulary = given.values()
        head_dim = field("head_dim") or hidden // heads
        kv_heads = field("num_key_value_heads") or heads
        tied = bool(field("tie_word_embeddings"))
        return cls(hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied)

    def linears(self) -> tuple[tuple[int, int, bool], ...]:
        """Inputs and outputs of a layer's linears, and whether devices split the outputs (else the inputs)."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (self.hidden, query, True), (self.hidden, keys, True), (self.hidden, keys, True),
            (query, self.hidden, False),
            (self.hidden, self.intermediate, True), (self.hidden, self.intermediate, True),
            (self.intermediate, self.hidden, False),
        )  # fmt: skip

    def weights(self) -> int:
        """Numbers of the whole model."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * sum(inputs * outputs for inputs, outputs, _ in self.linears()) + embeddings

    def rank_numbers(self, devices: int = 1) -> int:
        """Numbers of one rank of LoRA on one of the devices: of its two factors the one at the split side is split."""
        return self.layers * sum(
            inputs + outputs // devices if by_outputs else inputs // devices + outputs
            for inputs, outputs, by_outputs in self.linears()
        )

    def token(self, devices: int = 1) -> int:
        """Bytes of a token's keys and values on one of the devices."""
        fields = {
            "num_attention_heads": self.heads, "hidden_size": self.hidden, "head_dim": self.head_dim,
            "num_key_value_heads": max(1, self.kv_heads // devices), "num_hidden_layers": self.layers,
        }  # fmt: skip
        return token_bytes(fields.get, wide=False)


def padded(rank: int) -> int | None:
    """The rank that a slot is made for, or None where vLLM has no kernel for so many."""
    return next((each for each in LORA_RANKS if each >= rank), None)


@dataclass(frozen=True)
class Plan:
    """Where the memory of one device goes, in bytes."""

    share: int  # of the memory, what the engine may take
    weights: int
    slots: int
    token: int  # a token's keys and values
    page: int = PAGE

    @property
    def pages(self) -> int:
        """KV pages that what is left makes; 0 where nothing is."""
        left = self.share - self.weights - self.slots - STEP
        return max(0, left // (self.token * self.page))

    def requests(self, tokens: int, *, mixture: bool) -> int:
        """How many requests of that many tokens have pages at once. A mixture's takes two rows of them."""
        return (self.pages - 1) // (needed(tokens, self.page, mixture=mixture) - 1) if self.pages else 0


def needed(tokens: int, page: int, *, mixture: bool) -> int:
    """Pages the pool must have for one request of that many tokens."""
    return pair_pages(tokens, page) if mixture else request_pages(tokens, page)


def plan(
    shape: Shape,
    memory: float,
    *,
    slots: int,
    rank: int,
    devices: int = 1,
    share: float = 0.9,
    weight_bytes: float = WIDTH,
    page: int = PAGE,
) -> Plan:
    """What `slots` of `rank` leave of the memory of each of the devices (bytes)."""
    return Plan(
        share=int(share * memory),
        weights=int(weight_bytes * shape.weights() / devices),
        slots=WIDTH * slots * rank * shape.rank_numbers(devices),
        token=shape.token(devices),
        page=page,
    )


# mistralai/Mistral-7B-Instruct-v0.3 and meta-llama/Llama-3.3-70B-Instruct.
MODELS = {
    "7B": Shape(4096, 14336, 32, 32, 8, 128, 32768),
    "70B": Shape(8192, 28672, 80, 64, 8, 128, 128256),
}
# GiB that cards show to a program.
CARDS = {"L4 24 GB": 22.5, "A100 40 GB": 39.4, "A100 80 GB": 79.2, "H100 80 GB": 79.2}
DEVICES = {"7B": 1, "70B": 4}
RANKS = (8, 16, 64)
ADAPTERS, MIXED = 30, 4
LENGTH = 8192
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def tables() -> Iterator[str]:
    """The lines of docs/sizing.md's tables."""
    yield "**A slot**, GiB on each device, by the rank of the adapters. A bundle's rank is the sum of its adapters'."
    yield ""
    yield f"| model | rank r | an adapter | {ADAPTERS} of them | bundle of {MIXED} | bundle of {ADAPTERS} |"
    yield "|---|---|---|---|---|---|"
    for name, shape in MODELS.items():
        for rank in RANKS:
            one = padded(rank) or rank
            cells = [_slot(shape, name, rank, 1), f"{_gib(WIDTH * ADAPTERS * one * shape.rank_numbers(DEVICES[name]))}"]
            cells += [_slot(shape, name, rank * count, 1) for count in (MIXED, ADAPTERS)]
            yield f"| {_on(name)} | {rank} | {' | '.join(cells)} |"
    yield ""
    yield (
        f"**What is left for KV pages**, for {ADAPTERS} adapters of rank 16: thousands of tokens, and how many "
        f"requests of {LENGTH:,} tokens they hold at once, without a mixture / with one."
    )
    yield ""
    yield f"| model | settings | {' | '.join(CARDS)} |"
    yield f"|---|---|{'---|' * len(CARDS)}"
    for name, shape in MODELS.items():
        for text, slots, rank in _settings(16):
            cells = [
                _room(plan(shape, memory * GIB, slots=slots, rank=rank, devices=DEVICES[name]))
                for memory in CARDS.values()
            ]
            yield f"| {_on(name)} | {text} | {' | '.join(cells)} |"


def _settings(rank: int) -> list[tuple[str, int, int]]:
    mixed = padded(MIXED * rank) or LORA_RANKS[-1]
    every = padded(ADAPTERS * rank) or LORA_RANKS[-1]
    return [
        (f"all {ADAPTERS} in slots: `max_adapters: {ADAPTERS}`, `max_lora_rank: {rank}`", ADAPTERS, rank),
        (f"8 in slots: `max_adapters: 8`, `max_lora_rank: {rank}`", 8, rank),
        (f"8 in slots, a bundle of {MIXED} among them: `max_lora_rank: {mixed}`", 8, mixed),
        (f"2 in slots, a bundle of all {ADAPTERS} among them: `max_adapters: 2`, `max_lora_rank: {every}`", 2, every),
    ]


def _on(name: str) -> str:
    devices = DEVICES[name]
    return name if devices == 1 else f"{name}, {devices} cards"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _slot(shape: Shape, name: str, rank: int, slots: int) -> str:
    room = padded(rank)
    if room is None:
        return f"rank {rank}: none, {LORA_RANKS[-1]} is the most"
    return f"{_gib(WIDTH * slots * room * shape.rank_numbers(DEVICES[name]))} (rank {room})"


def _room(found: Plan) -> str:
    if found.pages < needed(LENGTH, found.page, mixture=False):
        return "no"
    plain, pairs = (found.requests(LENGTH, mixture=mixture) for mixture in (False, True))
    return f"{found.pages * found.page / 1000:.0f}k: {plain} / {pairs}"


def written(page: str) -> str:
    """A page with the tables as they are now."""
    block = "\n".join([BEGIN, *tables(), END])
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: block, page, flags=re.DOTALL)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")
