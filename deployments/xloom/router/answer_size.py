"""What a request's answer may come to: log-probabilities bounded before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xloom.protocol import XloomError

MAX_TOKEN_VALUES = 8192  # log-probabilities of one generated token: 110 kB on the wire
MAX_PROMPT_VALUES = 1 << 20  # of all the prompt's tokens: 15 MB on the wire, in pieces


def check_answer_size(sampling: Mapping[str, Any], prompt_tokens: int, vocabulary: int) -> None:
    """Hold what is asked for against the limits; -1 is the whole vocabulary. Raises `XloomError` (too_many_logprobs).

    `sampling` has the fields of vLLM's SamplingParams.
    """
    candidates = max(_count(sampling, "logprobs", vocabulary), _length(sampling.get("logprob_token_ids")))
    if candidates > MAX_TOKEN_VALUES:
        raise _too_many("logprobs", candidates, "token", MAX_TOKEN_VALUES)
    rows = sampling.get("prompt_logprob_token_ids")
    listed = sum(_length(row) for row in rows) if isinstance(rows, list) else 0
    values = max(prompt_tokens * _count(sampling, "prompt_logprobs", vocabulary), listed)
    if values > MAX_PROMPT_VALUES:
        raise _too_many("prompt_logprobs", values, "prompt", MAX_PROMPT_VALUES)


def _count(sampling: Mapping[str, Any], name: str, vocabulary: int) -> int:
    """Candidates of a token, the token itself apart."""
    asked = sampling.get(name)
    if not isinstance(asked, int):
        return 0
    return vocabulary if asked < 0 else asked


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _too_many(field: str, values: int, what: str, limit: int) -> XloomError:
    return XloomError(
        "too_many_logprobs",
        f"{field} asks for {values} log-probabilities a {what}; {limit} is the most.",
        "Ask for fewer, or send a shorter prompt." if what == "prompt" else "Ask for fewer.",
    )
