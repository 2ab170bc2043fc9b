"""What KV pages take, from a model's configuration: plain arithmetic, for engines and for `xloom doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def token_bytes(field: Callable[[str], Any], *, wide: bool, xlora: bool) -> int:
    """Bytes of one token's keys and values over all layers; `field` gives a field of the configuration, or None.

    `wide`: float32, else two bytes a number. X-LoRA keeps a second set for its scaling pass. Raises `KeyError` when
    the configuration is not a decoder's.
    """
    heads = _needed(field, "num_attention_heads")
    head_dim = field("head_dim") or _needed(field, "hidden_size") // heads
    kv_heads = field("num_key_value_heads") or heads
    size = 4 if wide else 2
    return int(2 * _needed(field, "num_hidden_layers") * kv_heads * head_dim * size * (2 if xlora else 1))


def _needed(field: Callable[[str], Any], name: str) -> int:
    value = field(name)
    if value is None:
        raise KeyError(name)
    return int(value)
