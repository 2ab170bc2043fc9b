"""Mixtures inside vLLM: a scaling sequence beside each request, and a gate between the LoRA shrink and expand.

Nothing here acts on a vLLM that xloom did not start: `activate` is called where an engine is configured, and in its
worker processes by `worker_extension_cls`. What is relied on of vLLM 0.32 is named beside each use;
`tests/integration/test_vllm_seams.py` fails when it changes.
"""

from __future__ import annotations

INPUT_GATES = "input_gates"  # in VllmConfig.additional_config["xloom"]: whether a GPU's graphs hold their kernel
WORKER_EXTENSION = "xloom.vllm.plugin.worker.MixtureWorker"
SCHEDULER = "xloom.vllm.plugin.scheduler.MixtureScheduler"
ASYNC_SCHEDULER = "xloom.vllm.plugin.scheduler.AsyncMixtureScheduler"
GATES = "xloom_gates"  # what a step's gates are called on their way to the replica


def activate() -> None:
    """Patch this process. Safe to call more than once."""
    from xloom.vllm.plugin import patches

    patches.apply()
