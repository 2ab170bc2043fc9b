"""Prefix-cache hits of pairs, held from when a scaling sequence is let in until its request is; and pages they need.

Relies on vLLM 0.32, `vllm.v1.core.kv_cache_manager.KVCacheManager`: `get_computed_blocks`, `truncate_computed_blocks`,
`coordinator.get_num_blocks_to_allocate`, and each `single_type_managers[i].block_pool` with `touch` and `free_blocks`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.request import Request

from xloom.vllm.plugin.pairs import MixtureRequest, running


@dataclass(frozen=True)
class _Hit:
    """What both halves of a pair may leave out: the same number of tokens, as gates are needed from there on."""

    request: MixtureRequest
    tokens: int
    mixture: KVCacheBlocks  # pages of the request; held
    scaling: KVCacheBlocks  # of its scaling sequence


class PairHits:
    """The hits of pairs that are half admitted, by the request's id."""

    def __init__(self, manager: KVCacheManager, block_size: int) -> None:
        self._manager, self._block_size = manager, block_size
        self._held: dict[str, _Hit] = {}

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, mixture: MixtureRequest) -> int:
        """Look a pair's tokens up, and keep the request's pages from being evicted. The pages that both need."""
        self.release(mixture.request_id)
        manager, empty = self._manager, self._manager.empty_kv_cache_blocks
        own, own_tokens, _ = manager.get_computed_blocks(mixture)
        base, base_tokens, _ = manager.get_computed_blocks(mixture.scaling)
        tokens = min(own_tokens, base_tokens) // self._block_size * self._block_size
        hit = _Hit(mixture, 0, empty, empty)
        if tokens:
            cut = manager.truncate_computed_blocks
            hit = _Hit(mixture, tokens, cut(own, tokens), cut(base, tokens))
        needed = self._needed(mixture, hit.mixture, tokens) + self._needed(mixture.scaling, hit.scaling, tokens)
        for pool, blocks in self._pools(hit):
            pool.touch(blocks)
        self._held[mixture.request_id] = hit
        return needed

    def release(self, request_id: str) -> None:
        """Let go of a request's pages; it may hold them itself by now."""
        hit = self._held.pop(request_id, None)
        if hit is not None:
            for pool, blocks in self._pools(hit):
                pool.free_blocks(reversed(blocks))

    def release_all_but(self, kept: Container[str]) -> None:
        """Let go of all pages but those of these requests."""
        for request_id in [each for each in self._held if each not in kept]:
            self.release(request_id)

    def tokens(self, request_id: str) -> int:
        """How many tokens a pair leaves out."""
        hit = self._held.get(request_id)
        return 0 if hit is None else hit.tokens

    def of_mixture(self, mixture: MixtureRequest) -> tuple[KVCacheBlocks, int]:
        """The request's hit, for its admission."""
        hit = self._held[mixture.request_id]
        return hit.mixture, hit.tokens

    def of_scaling(self, mixture: MixtureRequest) -> tuple[KVCacheBlocks, int]:
        """Its scaling sequence's hit, for that one's admission."""
        hit = self._held[mixture.request_id]
        return hit.scaling, hit.tokens

    def promised(self) -> int:
        """Pages that all requests with a hit held still need, but for those admitted in this step."""
        waiting = [hit for hit in self._held.values() if not running(hit.request)]
        return sum(self._needed(hit.request, hit.mixture, hit.tokens) for hit in waiting)

    def pages_of(self, mixture: MixtureRequest) -> int:
        """Pages that a request with a hit held still needs."""
        hit = self._held[mixture.request_id]
        return self._needed(mixture, hit.mixture, hit.tokens)

    def pages(self, request: Request) -> int:
        """Pages that any request needs that has none yet."""
        blocks, tokens, _ = self._manager.get_computed_blocks(request)
        return self._needed(request, blocks, tokens)

    def _needed(self, request: Request, computed: KVCacheBlocks, tokens: int) -> int:
        """As `KVCacheManager.allocate_slots` counts for `full_sequence_must_fit`; the watermark comes on top."""
        whole = min(request.num_tokens, self._manager.max_model_len)
        pages: int = self._manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=whole,
            new_computed_blocks=computed.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=tokens,
            num_local_computed_tokens=tokens,
            num_tokens_main_model=whole,
            apply_admission_cap=True,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        return pages + int(self._manager.watermark_blocks)

    def _pools(self, hit: _Hit) -> list[tuple[Any, list[Any]]]:
        managers = self._manager.coordinator.single_type_managers
        return [(each.block_pool, list(blocks)) for each, blocks in zip(managers, hit.mixture.blocks, strict=False)]
