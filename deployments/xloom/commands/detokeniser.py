"""Text from tokens as they come: a character made of several tokens is held back until it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 5  # tokens of the prompt that decide whether the text begins with a space
HALF = "\ufffd"  # what a tokenizer makes of the bytes of half a character


class Detokeniser:
    """One text; `tokenizer` is one of transformers."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._read = 0, len(self._tokens)  # decoded from `start`; all before `read` has been given

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that `tokens` add; with `last` also what was held back.

        Decoded twice over, with and without them, since a token's text depends on those before it.
        """
        self._tokens += tokens
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        if len(text) <= len(known) or (text.endswith(HALF) and not last):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
