"""The device vLLM has found, and whether X-LoRA runs there."""

from __future__ import annotations

from typing import Any, Literal

from xloom.protocol import XloomError


def device_of(platform: Any, *, mixtures: bool) -> Literal["cpu", "cuda"]:
    """Which of the two kinds of arguments vLLM's platform takes, whose kernels gates are written for.

    `platform`: `vllm.platforms.current_platform` (0.32), which is `UnspecifiedPlatform` where a build for GPUs finds
    none. Raises `XloomError`: device_missing; with `mixtures`, unsupported_by_backend for other devices.
    """
    if platform.is_cpu():
        return "cpu"
    if platform.is_unspecified():
        raise XloomError(
            "device_missing",
            "This vLLM is built for GPUs, and finds no NVIDIA driver here (NVML does not answer).",
            "Install the driver, start the container with its GPUs (nvidia-smi must list them), or install xloom[cpu].",
            500,
        )
    if platform.is_rocm() and not _built_for_rocm():
        raise XloomError(
            "device_missing",
            "This vLLM is built for NVIDIA GPUs, and there are AMD's here.",
            "Install vLLM's build for ROCm in the place of xloom[cuda]'s.",
            500,
        )
    if platform.is_cuda_alike():
        if platform.device_count() == 0:
            raise XloomError(
                "device_missing",
                "This process is given no GPU, although the machine has some.",
                "Set replicas.gpus to engine.tensor_parallel_size; see CUDA_VISIBLE_DEVICES.",
                500,
            )
        return "cuda"
    if mixtures:
        name = getattr(platform, "device_name", "") or getattr(platform, "device_type", "") or "this device"
        raise XloomError(
            "unsupported_by_backend",
            f"X-LoRA does not run on {name}: vLLM's LoRA kernels there have no gate.",
            "Serve the adapters by name with engine.enable_xlora: false, or run it on CPU or CUDA.",
        )
    return "cuda"


def _built_for_rocm() -> bool:
    import torch

    return torch.version.hip is not None
