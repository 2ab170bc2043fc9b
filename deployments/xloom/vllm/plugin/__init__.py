"""X-LoRA inside vLLM: a gate between the LoRA shrink and expand, and a second, paged, pass for the routing.

vLLM loads `register` in each of its processes through the entry-point group `vllm.general_plugins`. What is
relied on of vLLM 0.32 is named beside each use; `tests/integration/test_vllm_seams.py` fails when it changes.
"""

from __future__ import annotations

XLORA_PREFIX = "XLora"  # of the architectures registered here, before vLLM's own name
WORKER_EXTENSION = "xloom.vllm.plugin.figures.MixtureWorker"

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "MixtralForCausalLM",
)


def register() -> None:
    """Register the X-LoRA model classes and patch vLLM's LoRA seams. Safe to call more than once."""
    from vllm import ModelRegistry  # vllm.model_executor.models.registry, vLLM 0.32

    from xloom.vllm.plugin import patches

    for architecture in ARCHITECTURES:
        name = XLORA_PREFIX + architecture
        ModelRegistry.register_model(name, f"xloom.vllm.plugin.models:{name}")
    patches.apply()
