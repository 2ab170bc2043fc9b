"""KV pages take what the model's configuration says, read the same from a file and from transformers."""

from __future__ import annotations

from typing import Any

import pytest

from xloom.engines.kv_size import pair_pages, token_bytes, too_few_pages

CONFIG: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def test_keys_and_values_of_every_layer_count() -> None:
    assert token_bytes(CONFIG.get, wide=False) == 2 * 2 * 2 * 16 * 2


def test_float32_doubles_it() -> None:
    plain = token_bytes(CONFIG.get, wide=False)
    assert token_bytes(CONFIG.get, wide=True) == 2 * plain


def test_heads_have_the_size_that_is_written_down() -> None:
    own = CONFIG | {"head_dim": 128, "num_key_value_heads": None}
    assert token_bytes(own.get, wide=False) == 2 * 2 * 4 * 128 * 2


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(KeyError, match="num_hidden_layers"):
        token_bytes({"num_attention_heads": 4, "hidden_size": 64}.get, wide=False)


@pytest.mark.parametrize(
    ("tokens", "block_size", "needed"), [(512, 32, 33), (513, 32, 35), (1, 16, 3), (2048, 16, 257)]
)
def test_a_pair_needs_its_pages_twice_and_one_is_the_pools_own(tokens: int, block_size: int, needed: int) -> None:
    assert pair_pages(tokens, block_size) == needed


def test_too_few_pages_are_named_with_how_many_it_takes() -> None:
    error = too_few_pages(24, pair_pages(512, 32), 512)
    assert error.code == "too_few_pages"
    assert "24 KV pages" in error.message
    assert "512 tokens" in error.message
    assert "at least 33 pages" in error.message
    assert "max_model_len" in error.cure
