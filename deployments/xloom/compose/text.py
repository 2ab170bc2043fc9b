"""The text a router is trained on and judged by: a stream of tokens for each domain, cut into rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xloom.protocol import XloomError
from xloom.quantization import calibration

if TYPE_CHECKING:
    from xloom.sample.corpus import Document

MIXED = "mixed"  # the column of rows that join all domains, or of the text given as mixed
EVALUATED = 512  # tokens of a held-out row, where there are as many
PIECES = 4  # of different domains in a joined row that is held out
SHORTEST = 32  # tokens of a held-out row

Encode = Callable[[str], Sequence[int]]


def text_encoder(tokenizer: Any) -> Encode:
    """A tokenizer for texts; begin-of-text is there once, also where a text has it written out."""
    encode, begin = calibration.encoder(tokenizer), tokenizer.bos_token_id

    def once(text: str) -> list[int]:
        ids = encode(text)
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    return once


@dataclass(frozen=True)
class Streams:
    """Tokens `[num_tokens]` by domain, and those of mixed text (None: rows are joined from the domains)."""

    domains: Mapping[str, Tensor]
    mixed: Tensor | None

    @classmethod
    def read(
        cls, domains: Mapping[str, str], mixed: str | None, encode: Encode, *, held_out: bool, limit: int
    ) -> Streams:
        """Read texts, at most `limit` tokens of each. Raises `XloomError` (no_calibration)."""
        return cls(
            {name: _stream(name, text, encode, held_out, limit) for name, text in domains.items()},
            None if mixed is None else _stream(MIXED, mixed, encode, held_out, limit),
        )

    def every(self) -> dict[str, Tensor]:
        """All streams by name, mixed text among them."""
        return dict(self.domains) | ({} if self.mixed is None else {MIXED: self.mixed})


def fingerprint(name: str, text: str) -> str:
    """What decides the tokens of a text, beside the tokeniser. Raises `XloomError` (no_calibration)."""
    return calibration.fingerprint(text, _called(name))


def _called(name: str) -> str:
    """How an error speaks of a text."""
    return f"The text of {name},"


def _stream(name: str, text: str, encode: Encode, held_out: bool, limit: int) -> Tensor:
    if text == calibration.SAMPLE:
        texts = _sample_texts(name, held_out)
    elif calibration.is_local(text) or not Path(text).exists():
        texts = calibration.documents(text, held_out=held_out, setting=_called(name))[0]
    else:
        message = f"The text of {name}, {text!r}, is no .txt, .json or .jsonl file."
        raise XloomError("no_calibration", message, "Rename it, or write one record with a text on each line.")
    texts = random.Random(0).sample(texts, len(texts))
    tokens: list[int] = []
    for each in texts:
        tokens += encode(each)
        if len(tokens) >= limit:
            break
    return torch.tensor(tokens[:limit], dtype=torch.long)


def _sample_texts(name: str, held_out: bool) -> list[str]:
    """The sample's documents of the domain of this name; for mixed text of all domains."""
    from xloom.sample.corpus import DOMAINS

    if name not in (*DOMAINS, MIXED):
        message = f"The sample has no text for {name!r}: its domains are {', '.join(DOMAINS)}."
        raise XloomError("no_calibration", message, f"Name a file: --text {name}=FILE.jsonl.")
    return [each.text for each in _sample() if each.held_out == held_out and name in (each.domain, MIXED)]


@lru_cache(maxsize=1)
def _sample() -> Sequence[Document]:
    """All of the sample's documents, which take seconds to make."""
    from xloom.sample.corpus import documents

    return documents()


@dataclass(frozen=True)
class Batches:
    """Training rows, drawn from the seed and the step alone: a run that goes on sees what it would have seen.

    A row joins pieces of random domains; where mixed text is given, every other row is a piece of that.
    """

    streams: Streams
    rows: int
    length: int  # tokens
    piece: int  # tokens of one domain in a row
    seed: int

    def check(self) -> None:
        """Raises `XloomError` (too_little_text)."""
        for name, stream in self.streams.every().items():
            wanted = self.length if name == MIXED else self.piece
            if len(stream) < wanted:
                raise too_little(name, len(stream), wanted, "train on")

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The rows of a step, and each token's domain by number, -1 where it is not known: both `[rows, length]`."""
        rng = random.Random(f"{self.seed}/{step}")
        names = list(self.streams.domains)
        rows, domains = [], []
        for number in range(self.rows):
            if self.streams.mixed is not None and (number % 2 or not names):
                rows.append(_cut(self.streams.mixed, self.length, rng))
                domains.append(torch.full((self.length,), -1))
                continue
            pieces: list[Tensor] = []
            known: list[Tensor] = []
            while len(pieces) * self.piece < self.length:
                domain = rng.randrange(len(names))
                pieces.append(_cut(self.streams.domains[names[domain]], self.piece, rng))
                known.append(torch.full((self.piece,), domain))
            rows.append(torch.cat(pieces)[: self.length])
            domains.append(torch.cat(known)[: self.length])
        return torch.stack(rows), torch.stack(domains)


def _cut(stream: Tensor, length: int, rng: random.Random) -> Tensor:
    start = rng.randrange(len(stream) - length + 1)
    return stream[start : start + length]


def held_out_rows(streams: Streams, count: int, longest: int, seed: int) -> dict[str, Tensor]:
    """At most `count` rows of each domain `[count, tokens]`, one after another from its start on, and of mixed text.

    Without mixed text its rows join pieces of all domains. Raises `XloomError` (too_little_text).
    """
    made = {}
    for name, stream in streams.every().items():
        length = min(EVALUATED, longest, len(stream))
        if length < SHORTEST:
            raise too_little(name, len(stream), SHORTEST, "hold out")
        found = min(count, len(stream) // length)
        made[name] = stream[: found * length].view(found, length)
    if streams.mixed is None and len(streams.domains) > 1:
        rng = random.Random(seed)
        piece = min(EVALUATED, longest, *(row.shape[1] for row in made.values())) // PIECES
        rows = [
            torch.cat([_cut(streams.domains[name], piece, rng) for name in _order(list(streams.domains), rng)])
            for _ in range(count)
        ]
        made[MIXED] = torch.stack(rows)
    return made


def _order(names: list[str], rng: random.Random) -> list[str]:
    """The domains of one row's pieces: all of them in turn, in a random order."""
    order: list[str] = []
    while len(order) < PIECES:
        order += rng.sample(names, len(names))
    return order[:PIECES]


def too_little(name: str, found: int, wanted: int, purpose: str) -> XloomError:
    """The error for a text that is too short."""
    return XloomError(
        "too_little_text",
        f"The text of {name} comes to {found} tokens to {purpose}, and {wanted} are needed.",
        "Give more text: one document in sixteen is held out.",
    )
