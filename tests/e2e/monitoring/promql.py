"""What a PromQL expression reads: enough of its grammar to find selectors and comparisons, and no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_AGGREGATIONS = "avg bottomk count count_values group max min quantile stddev stdvar sum topk"
_WORDS = "and atan2 bool by end group_left group_right ignoring inf nan offset on or start unless without"
NOT_METRICS = frozenset(f"{_AGGREGATIONS} {_WORDS}".split())
TOKEN = re.compile(
    r"""
    (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
  | (?P<labels>\{(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^"'}])*\})
  | (?P<range>\[[^]]*])
  | (?P<grouping>\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\))
  | (?P<word>[a-zA-Z_:][a-zA-Z0-9_:]*)
  | (?P<number>[0-9][0-9a-zA-Z.]*)
  | (?P<comparison>[=!><]=|[><])
  | (?P<space>\s+)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_OPPOSITES = {"absent": "count", "absent_over_time": "count_over_time", "unless": "and"}


class Token(NamedTuple):
    """A piece of an expression; the pieces joined are the expression."""

    kind: str
    text: str


def tokens(expression: str) -> list[Token]:
    """All pieces, spaces included."""
    return [Token(str(match.lastgroup), match[0]) for match in TOKEN.finditer(expression)]


def selectors(expression: str) -> list[str]:
    """The instant selectors: a metric's name with its label matchers, without range and offset."""
    found = [token for token in tokens(expression) if token.kind != "space"]
    return list(dict.fromkeys(_selectors(found)))


def _selectors(found: list[Token]) -> Iterator[str]:
    following = [*found[1:], Token("end", "")]
    for token, after in zip(found, following, strict=True):
        if token.kind == "word" and after.text != "(" and token.text.lower() not in NOT_METRICS:
            yield token.text + (after.text if after.kind == "labels" else "")
    for before, token in zip([Token("start", ""), *found], found, strict=False):
        if token.kind == "labels" and before.kind != "word":  # {__name__=~"..."}
            yield token.text


def unconditional(expression: str) -> str:
    """An alert's expression as one that has a value whenever its data is there, be the condition true or not."""
    written = [
        Token(token.kind, f"{token.text} bool") if token.kind == "comparison" else token for token in tokens(expression)
    ]
    text = "".join(_OPPOSITES.get(token.text, token.text) if token.kind == "word" else token.text for token in written)
    return re.sub(r"\bbool\s+bool\b", "bool", text)
