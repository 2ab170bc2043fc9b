"""Adapters' names inside vLLM."""

from __future__ import annotations

from xloom.protocol import AdapterRef
from xloom.vllm.lora import adapter_id, adapter_ref, lora_request, plain_name


def test_a_reference_survives_the_front_end() -> None:
    ref = AdapterRef("my.code-adapter_2", "ab" * 32, "xlora")
    assert adapter_ref(lora_request(ref)) == ref


def test_generations_have_ids_of_their_own() -> None:
    ids = {adapter_id(AdapterRef("code", f"{number:064x}", "lora")) for number in range(1000)}
    assert len(ids) == 1000
    assert all(0 < number < 2**31 for number in ids)


def test_users_see_the_plain_name() -> None:
    assert plain_name(lora_request(AdapterRef("code", "ff" * 32, "lora")).lora_name) == "code"
