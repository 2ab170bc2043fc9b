"""Text from tokens as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_tokenizer
from xloom.commands.detokeniser import Detokeniser

TEXT = "héllo 日本語 🦋🦋 done"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each byte a token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def pieces(tokenizer: Any, prompt: list[int], tokens: list[int]) -> list[str]:
    text = Detokeniser(tokenizer, prompt)
    return [text.push([token], last=number == len(tokens) - 1) for number, token in enumerate(tokens)]


def test_characters_of_many_bytes_come_whole(tokenizer: Any) -> None:
    found = pieces(tokenizer, tokenizer("prompt").input_ids, tokenizer(TEXT).input_ids)
    assert "".join(found) == TEXT
    assert not any("�" in piece for piece in found)
    assert "🦋" in found


def test_half_a_character_at_the_end_is_shown_for_what_it_is(tokenizer: Any) -> None:
    tokens = tokenizer("ab🦋").input_ids[:-1]
    assert "".join(pieces(tokenizer, [], tokens)).startswith("ab")
    assert "".join(pieces(tokenizer, [], tokens)).endswith("�")


def test_special_tokens_are_left_out(tokenizer: Any) -> None:
    assert "".join(pieces(tokenizer, [256], [*tokenizer("ab").input_ids, 257])) == "ab"


def test_several_tokens_at_once_are_one_piece(tokenizer: Any) -> None:
    text = Detokeniser(tokenizer, [])
    assert text.push(tokenizer("日本").input_ids) == "日本"
    assert text.push([]) == ""


def test_the_space_before_a_word_is_kept(tmp_path: Path) -> None:
    """Tokenizers of the sentencepiece kind drop the space of the first word they decode."""
    words = {"▁once": 0, "▁upon": 1, "▁a": 2, "<unk>": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert pieces(tokenizer, [0], [1, 2]) == [" upon", " a"]
