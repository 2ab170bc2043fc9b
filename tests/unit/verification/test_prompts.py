"""What an engine is asked: texts of a fitting length, and random tokens."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.models import VOCAB, tiny_tokenizer
from xloom.verification.prompts import LONGEST, SHORTEST, TEXTS, prompts, random_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_as_many_as_asked_for_and_the_same_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    made = prompts(tokenizer, 12, vocabulary=VOCAB, room=128)
    assert len(made) == 12
    assert len({tuple(prompt) for prompt in made}) == 12
    assert made == prompts(tokenizer, 12, vocabulary=VOCAB, room=128)
    assert all(SHORTEST <= len(prompt) <= LONGEST for prompt in made)


def test_texts_come_first_and_random_tokens_among_them(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, third = prompts(tokenizer, 3, vocabulary=VOCAB, room=128)
    assert TEXTS[0].startswith(tokenizer.decode(first))
    assert TEXTS[1].startswith(tokenizer.decode(second))
    assert not any(text.startswith(tokenizer.decode(third)) for text in TEXTS)


def test_they_fit_a_small_context(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(len(prompt) == 16 for prompt in prompts(tokenizer, 6, vocabulary=VOCAB, room=16))


def test_random_tokens_have_no_meaning_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = random_prompt(tokenizer, VOCAB, 0, 4000)
    assert not set(drawn) & set(tokenizer.all_special_ids)
    assert max(drawn) < VOCAB


def test_tokens_beyond_the_models_vocabulary_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    assert max(token for prompt in prompts(tokenizer, 6, vocabulary=100, room=128) for token in prompt) < 100
