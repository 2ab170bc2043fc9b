"""What an engine is asked: texts of a fitting length, and random tokens."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.models import VOCAB, tiny_tokenizer
from xloom.verification.prompts import LONGEST, SHORTEST, TEXTS, Prompter


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return Prompter(AutoTokenizer.from_pretrained(folder), VOCAB)


def test_as_many_as_asked_for_and_the_same_each_time(prompter: Prompter) -> None:
    made = prompter.prompts(12, max_tokens=128)
    assert len(made) == 12
    assert len({tuple(prompt) for prompt in made}) == 12
    assert made == prompter.prompts(12, max_tokens=128)
    assert all(SHORTEST <= len(prompt) <= LONGEST for prompt in made)


def test_texts_come_first_and_random_tokens_among_them(prompter: Prompter) -> None:
    first, second, third = prompter.prompts(3, max_tokens=128)
    assert TEXTS[0].startswith(prompter.tokenizer.decode(first))
    assert TEXTS[1].startswith(prompter.tokenizer.decode(second))
    assert not any(text.startswith(prompter.tokenizer.decode(third)) for text in TEXTS)


def test_they_fit_a_small_context(prompter: Prompter) -> None:
    assert all(len(prompt) == 16 for prompt in prompter.prompts(6, max_tokens=16))


def test_random_tokens_have_no_meaning_of_their_own(prompter: Prompter) -> None:
    drawn = prompter.random(0, 4000)
    assert not set(drawn) & set(prompter.tokenizer.all_special_ids)
    assert max(drawn) < VOCAB


def test_tokens_beyond_the_models_vocabulary_are_left_out(prompter: Prompter) -> None:
    assert (
        max(token for prompt in Prompter(prompter.tokenizer, 100).prompts(6, max_tokens=128) for token in prompt) < 100
    )
