"""KV pages take what the model's configuration says, read the same from a file and from transformers."""

from __future__ import annotations

from typing import Any

import pytest

from xloom.engines.kv_size import token_bytes

CONFIG: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def test_keys_and_values_of_every_layer_count() -> None:
    assert token_bytes(CONFIG.get, wide=False, xlora=False) == 2 * 2 * 2 * 16 * 2


def test_float32_and_twin_pages_double_it() -> None:
    plain = token_bytes(CONFIG.get, wide=False, xlora=False)
    assert token_bytes(CONFIG.get, wide=True, xlora=False) == 2 * plain
    assert token_bytes(CONFIG.get, wide=False, xlora=True) == 2 * plain


def test_heads_have_the_size_that_is_written_down() -> None:
    own = CONFIG | {"head_dim": 128, "num_key_value_heads": None}
    assert token_bytes(own.get, wide=False, xlora=False) == 2 * 2 * 4 * 128 * 2


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(KeyError, match="num_hidden_layers"):
        token_bytes({"num_attention_heads": 4, "hidden_size": 64}.get, wide=False, xlora=False)
