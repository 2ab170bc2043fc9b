"""What a proof asks an engine: a few short texts of several kinds, and random tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

SHORTEST, LONGEST = 20, 56  # tokens of a text
RANDOM_LENGTH = 40  # tokens
TEXTS = (
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n\n"
    "def count_words(path):\n    words = {}\n    for line in read_lines(path):\n",
    "The river rises in the hills north of the town and runs for forty miles before it meets the sea. In spring, when "
    "the snow melts, it carries branches and stones; in late summer a child can wade across it. The old mill",
    '{"order": 1042, "customer": {"name": "Ada", "city": "Riga"}, "items": [{"product": "lamp", "count": 2, '
    '"price": 18.5}, {"product": "chair", "count": 4, "price": 39.0}], "paid": true, "total":',
    "Question: A shop sells pens at 3 coins each and books at 12 coins each. Noor buys 7 pens and 2 books and pays "
    "with a note of 50 coins. How much change does she get? Answer: 7 pens cost 21 coins and 2 books cost 24 coins, so",
    "Liebe Kolleginnen und Kollegen, die Sitzung am Donnerstag beginnt um neun Uhr. Bitte bringt eure Unterlagen mit "
    "und sagt bis morgen Bescheid, wenn ihr nicht kommen könnt. Auf der Tagesordnung stehen",
)


def prompts(tokenizer: Any, count: int, *, vocabulary: int, room: int) -> list[list[int]]:
    """`count` prompts as tokens below `vocabulary`, of at most `room` tokens each.

    Every third, and all once the texts are used up, is of random tokens: they reach parts of a model that no text
    does, and nothing about them is likely. The same model gets the same prompts.
    """
    made: list[list[int]] = []
    texts = iter(TEXTS)
    while len(made) < count:
        text = None if len(made) % 3 == 2 else next(texts, None)
        prompt = random_prompt(tokenizer, vocabulary, len(made)) if text is None else _tokens(tokenizer, text)
        made.append([token for token in prompt if token < vocabulary][:room])
    return made


def random_prompt(tokenizer: Any, vocabulary: int, seed: int, length: int = RANDOM_LENGTH) -> list[int]:
    """Ordinary tokens drawn at random: none with a meaning of its own, such as the end of a text."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = min(vocabulary, len(tokenizer))
    ordinary: Sequence[int] = [token for token in range(size) if token not in special]
    return random.Random(seed).choices(ordinary, k=length)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = list(tokenizer(text).input_ids)
    while 0 < len(ids) < SHORTEST:
        ids += tokenizer(text, add_special_tokens=False).input_ids or ids
    return ids[:LONGEST]
