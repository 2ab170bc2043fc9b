"""What an answer may come to."""

from __future__ import annotations

from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.router.answer_size import check_answer_size


@pytest.mark.parametrize(
    ("sampling", "prompt", "vocabulary"),
    [
        ({}, 100_000, 150_000),
        ({"logprobs": 20, "prompt_logprobs": 20}, 32_000, 150_000),
        ({"logprobs": -1}, 100, 4096),
        ({"prompt_logprobs": -1}, 200, 4096),
        ({"logprobs": 0, "prompt_logprobs": 0}, 100_000, 150_000),
    ],
)
def test_what_is_usual_is_taken(sampling: dict[str, Any], prompt: int, vocabulary: int) -> None:
    check_answer_size(sampling, prompt, vocabulary)


@pytest.mark.parametrize(
    ("sampling", "prompt", "vocabulary"),
    [
        ({"logprobs": -1}, 1, 150_000),
        ({"prompt_logprobs": -1}, 2000, 4096),
        ({"logprobs": 10_000}, 1, 150_000),
        ({"logprob_token_ids": list(range(9000))}, 1, 150_000),
        ({"prompt_logprob_token_ids": [[1] * 9000] * 200}, 200, 150_000),
    ],
)
def test_a_whole_vocabulary_is_bounded(sampling: dict[str, Any], prompt: int, vocabulary: int) -> None:
    with pytest.raises(XloomError) as caught:
        check_answer_size(sampling, prompt, vocabulary)
    assert caught.value.code == "too_many_logprobs"
