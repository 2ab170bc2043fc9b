"""The folder mistral.rs loads, and the tokenizer that makes text and tokens the same thing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.models import VOCAB, tiny_model
from xloom.engines.mistralrs.folder import (
    MOST_TOKENS,
    eos_tokens,
    model_folder,
    patched_config,
    read_config,
    served_folder,
    text_of,
    tokenizer_json,
    tokens_of,
)
from xloom.protocol import XloomError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("mistralrs") / "model", "llama")


def test_any_tokens_come_back_as_they_went() -> None:
    tokens = random.Random(0).choices(range(VOCAB), k=500)
    assert tokens_of(text_of(tokens)) == tokens
    assert tokens_of(text_of([0, MOST_TOKENS - 1])) == [0, MOST_TOKENS - 1]
    assert tokens_of("") == []


def test_the_tokenizer_reads_and_writes_that_text() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(VOCAB)))
    tokens = random.Random(1).choices(range(VOCAB), k=500)
    assert tokenizer.get_vocab_size() == VOCAB
    assert tokenizer.encode(text_of(tokens)).ids == tokens  # special tokens added: there are none
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text_of(tokens)


def test_other_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="alphabet"):
        tokens_of("plain")


def test_a_vocabulary_beyond_unicode_is_refused() -> None:
    with pytest.raises(XloomError) as caught:
        tokenizer_json(MOST_TOKENS + 1)
    assert caught.value.code == "unsupported_architecture"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_rotary_settings_are_where_it_looks(rope: dict[str, object], expected: dict[str, object]) -> None:
    patched = patched_config({"vocab_size": 9, "rope_parameters": rope})
    assert {key: value for key, value in patched.items() if key not in ("vocab_size", "rope_parameters")} == expected
    assert patched_config({"rope_theta": 3.0, "rope_parameters": rope})["rope_theta"] == 3.0  # it knows best


def test_weights_are_linked_and_the_folder_is_made_once(model: Path, tmp_path: Path) -> None:
    folder = served_folder(model, tmp_path)
    assert (folder / "model.safetensors").resolve() == (model / "model.safetensors").resolve()
    assert json.loads((folder / "config.json").read_text())["rope_theta"] > 0
    assert served_folder(model, tmp_path) == folder
    assert list(tmp_path.iterdir()) == [folder]


def test_other_weights_get_another_folder(tmp_path: Path) -> None:
    first = served_folder(tiny_model(tmp_path / "model", "llama"), tmp_path / "cache")
    tiny_model(tmp_path / "model", "llama", seed=1)
    assert served_folder(tmp_path / "model", tmp_path / "cache") != first


def test_the_model_says_what_ends_a_text(model: Path, tmp_path: Path) -> None:
    assert eos_tokens(model, read_config(model)) == {257}
    assert eos_tokens(tmp_path, {"eos_token_id": [1, 2]}) == {1, 2}
    assert eos_tokens(tmp_path, {}) == frozenset()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as caught:
        model_folder(str(tmp_path), None)
    assert caught.value.code == "model_not_loadable"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(XloomError) as caught:
        read_config(tmp_path)
    assert caught.value.code == "model_not_loadable"
