"""What a proof asks an engine: a few short texts of several kinds, and random tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xloom.protocol import XloomError

if TYPE_CHECKING:
    from xloom.settings import ModelSettings

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


@dataclass(frozen=True)
class Prompter:
    """Makes prompts of a model's own tokens. The same model gets the same prompts."""

    tokenizer: Any
    vocabulary: int  # the model's; a tokenizer may have more

    @classmethod
    def open(cls, model: ModelSettings) -> Prompter:
        """Read the model's tokenizer. Raises `XloomError` (tokenizer_not_loadable)."""
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise XloomError(
                "tokenizer_not_loadable",
                f"No tokenizer could be read from {model.source!r}: {error}",
                "Name a model that comes with its tokenizer.",
            ) from error
        return cls(tokenizer, int(config.get_text_config().vocab_size))

    def prompts(self, count: int, *, max_tokens: int) -> list[list[int]]:
        """`count` prompts of at most `max_tokens` tokens each.

        Every third, and all once the texts are used up, is of random tokens: they reach parts of a model that no text
        does, and nothing about them is likely.
        """
        made: list[list[int]] = []
        texts = iter(TEXTS)
        while len(made) < count:
            text = None if len(made) % 3 == 2 else next(texts, None)
            prompt = self.random(len(made)) if text is None else self._tokens(text)
            made.append([token for token in prompt if token < self.vocabulary][:max_tokens])
        return made

    def random(self, seed: int, length: int = RANDOM_LENGTH) -> list[int]:
        """Ordinary tokens drawn at random: none with a meaning of its own, such as the end of a text."""
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        size = min(self.vocabulary, len(self.tokenizer))
        ordinary = [token for token in range(size) if token not in special]
        return random.Random(seed).choices(ordinary, k=length)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = list(self.tokenizer(text).input_ids)
        while 0 < len(ids) < SHORTEST:
            ids += self.tokenizer(text, add_special_tokens=False).input_ids or ids
        return ids[:LONGEST]
