"""What vLLM's LoRA kernels are told of a batch, made on the host and copied without waiting.

vLLM makes it on the GPU, and reads two results back each time a batch is another than the one before
(`LoRAKernelMeta.prepare_tensors`: "TODO avoid gpu<->cpu sync here"), so the host waits for all steps under way. It
does so seldom; with mixtures every step is another than the one before, and waiting took 1 ms of each on an H100.

Relied on, vLLM 0.32: the fields of `LoRAKernelMeta` and those of `PunicaWrapperBase` that `_update_base_metadata` sets.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.utils.torch_utils import async_tensor_h2d

Array = np.ndarray[Any, Any]


def slots_of(adapter_ids: Array, slot_ids: Sequence[int | None]) -> Array:
    """`[n]` int64: the slot of each row's adapter, -1 for the base model. Raises `KeyError` for one that has none."""
    slots = np.full(len(adapter_ids), -1, dtype=np.int64)
    for slot, adapter_id in enumerate(slot_ids):
        if adapter_id is not None:
            slots[adapter_ids == adapter_id] = slot
    lacking = (slots < 0) & (adapter_ids > 0)
    if lacking.any():
        raise KeyError(int(adapter_ids[lacking][0]))
    return slots


def prepare_indices(wrapper: Any, tokens: Array, samples: Array, max_loras: int, vocab_size: int) -> None:
    """As `_update_base_metadata`, from the slots `[num_tokens]` of tokens and `[num_requests]` of what is sampled."""
    padded = np.arange(len(samples)) + np.where(samples < 0, max_loras - 1, samples) * len(samples)
    embeddings = np.maximum(tokens, 0) * vocab_size
    filled = {
        "_token_lora_indices": tokens,
        "_sampler_indices": samples,
        "_sampler_indices_padded": padded,
        "_embeddings_indices": embeddings,
    }
    for name, indices in filled.items():
        async_tensor_h2d(indices, out=getattr(wrapper, name)[: len(indices)])
    wrapper.indices_len[:] = [len(indices) for indices in (tokens, samples, padded, embeddings)]


def prepare_kernels(meta: Any, slots: Array) -> None:
    """As `LoRAKernelMeta.prepare_tensors`, from the slot `[num_rows]` of each row."""
    found, counts = np.unique(slots, return_counts=True)
    no_lora = not len(found) or int(found[-1]) < 0
    if no_lora:
        found, counts = found[:0], counts[:0]
    else:
        async_tensor_h2d(slots.astype(np.int32), out=meta.token_lora_mapping[: len(slots)])
        order = np.argsort(slots, kind="stable").astype(np.int32)
        async_tensor_h2d(order, out=meta.token_indices_sorted_by_lora_ids[: len(slots)])
    for out, first, values, rest in (
        (meta.active_lora_ids, 0, found, -1),
        (meta.num_tokens_per_lora, 0, counts, 0),
        (meta.lora_token_start_loc, 1, np.cumsum(counts), 0),
    ):
        whole = np.full(len(out), rest, dtype=np.int32)
        whole[first : first + len(values)] = values
        async_tensor_h2d(whole, out=out)
    meta.no_lora_flag_cpu[0] = no_lora
    meta.num_active_loras_cpu[0] = _as_captured(len(found), meta.captured_lora_counts)


def _as_captured(count: int, captured: Sequence[int]) -> int:
    """The number of slots of the CUDA graph that runs so many: the next one captured."""
    place = bisect.bisect_left(captured, count)
    return captured[place] if count and place < len(captured) else count
