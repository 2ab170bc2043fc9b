"""Whether the pool has room for a request beside its scaling sequence, by the pages vLLM says a request needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_model
from xloom.engines.kv_size import pair_pages
from xloom.protocol import XloomError
from xloom.vllm.engine.arguments import check_pages

from .harness import Engine


def test_layers_with_a_window_are_counted_as_vllm_counts_them(tmp_path: Path) -> None:
    """Half of Gemma 2's layers have a window of 64 tokens here, and pages of their own in the same pool."""
    engine = Engine(
        tiny_model(tmp_path, "gemma2", tied=True),
        xlora=False,
        max_num_seqs=8,
        paged_attention={"block_size": 32, "max_blocks": 42},
        extra_args={"max_num_batched_tokens": 64},
    )
    try:
        config = engine.backend._core.vllm_config
        assert config.cache_config.num_gpu_blocks == 42
        one = 512 // 32 + (64 - 1 + 64) // 32 + 2  # all of it; the window and a step's tokens, and pages half in use
        with pytest.raises(XloomError, match=f"at least {1 + 2 * one} pages") as raised:
            check_pages(config)
        assert raised.value.code == "too_few_pages"
        # Where all layers attend to everything, it is what is reckoned before the start.
        config.cache_config.num_gpu_blocks, config.cache_config.kv_cache_max_concurrency = 40, 40 / 16
        check_pages(config)
        config.cache_config.num_gpu_blocks, config.cache_config.kv_cache_max_concurrency = 32, 32 / 16
        with pytest.raises(XloomError, match=f"at least {pair_pages(512, 32)} pages"):
            check_pages(config)
    finally:
        engine.close()
