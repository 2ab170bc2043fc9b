"""How an adapter at one generation is named inside vLLM: one `LoRARequest` per `AdapterRef`, and back.

vLLM keys adapters by `lora_int_id` and prefix-cache blocks by `lora_name` (vLLM 0.32,
`vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys`), so both include the generation: blocks that
an older version filled are never reused.
"""

from __future__ import annotations

from vllm.lora.request import LoRARequest

from xloom.protocol import AdapterRef, adapter_number, split_adapter_key


def adapter_id(ref: AdapterRef) -> int:
    """vLLM's `lora_int_id`. The store takes no two adapters in that share one."""
    return adapter_number(ref.key)


def lora_request(ref: AdapterRef, path: str | None = None) -> LoRARequest:
    """vLLM's request object; without a path (in a router, which loads nothing) the kind stands in for it."""
    return LoRARequest(lora_name=ref.key, lora_int_id=adapter_id(ref), lora_path=path or ref.kind)


def adapter_ref(request: LoRARequest) -> AdapterRef:
    """The reference a router's `lora_request` was made from."""
    name, generation = split_adapter_key(request.lora_name)
    return AdapterRef(name, generation, request.lora_path)


def plain_name(lora_name: str) -> str:
    """The name a user knows."""
    return split_adapter_key(lora_name)[0]
