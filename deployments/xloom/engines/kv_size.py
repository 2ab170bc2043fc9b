"""What KV pages take, and how many are needed: plain arithmetic, for engines and for `xloom doctor`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from xloom.protocol import XloomError

NULL_PAGES = 1  # vllm.v1.core.block_pool.BlockPool keeps one page for itself; vLLM 0.32


def token_bytes(field: Callable[[str], Any], *, wide: bool) -> int:
    """Bytes of one token's keys and values over all layers; `field` gives a field of the configuration, or None.

    `wide`: float32, else two bytes a number. Raises `KeyError` when the configuration is not a decoder's.
    """
    heads = _needed(field, "num_attention_heads")
    head_dim = field("head_dim") or _needed(field, "hidden_size") // heads
    kv_heads = field("num_key_value_heads") or heads
    size = 4 if wide else 2
    return int(2 * _needed(field, "num_hidden_layers") * kv_heads * head_dim * size)


def request_pages(num_tokens: int, block_size: int) -> int:
    """Pages the pool must have for a request of `num_tokens`. For layers that attend to everything."""
    return NULL_PAGES + math.ceil(num_tokens / block_size)


def pair_pages(num_tokens: int, block_size: int) -> int:
    """Pages the pool must have for an X-LoRA request of `num_tokens` and the scaling sequence beside it.

    For layers that attend to everything; those with a window need fewer.
    """
    return NULL_PAGES + 2 * math.ceil(num_tokens / block_size)


def too_few_pages(num_pages: int, needed: int, max_model_len: int, *, pair: bool = True, size: int = 0) -> XloomError:
    """What is wrong with a pool in which a request of the full length can never run.

    `pair`: an X-LoRA request, with its scaling sequence; `size`: tokens in a page, where they are known.
    """
    request, whose = ("an X-LoRA request", ", its own and its scaling sequence's") if pair else ("a request", "")
    pages = f"pages of {size} tokens" if size else "pages"
    return XloomError(
        "too_few_pages",
        f"There are {num_pages} KV {pages}; {request} of max_model_len ({max_model_len} tokens) needs at least "
        f"{needed} pages{whose}.",
        "Lower engine.max_model_len, or raise engine.paged_attention.max_blocks (on a GPU: gpu_memory_fraction).",
    )


def _needed(field: Callable[[str], Any], name: str) -> int:
    value = field(name)
    if value is None:
        raise KeyError(name)
    return int(value)
