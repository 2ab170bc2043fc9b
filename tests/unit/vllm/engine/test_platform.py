"""What vLLM finds to run on, told by its own platform classes: CPU, CUDA, or a clear error."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.platforms.interface import Platform, PlatformEnum, UnspecifiedPlatform

from xloom.protocol import XloomError
from xloom.vllm.engine.platform import device_of


def platform(kind: PlatformEnum, *, devices: int = 1, name: str = "") -> Any:
    class Found(Platform):
        _enum = kind
        device_name = name
        device_type = name

        @classmethod
        def device_count(cls) -> int:
            return devices

    return Found()


def refusal(found: Any, *, mixtures: bool = False) -> XloomError:
    with pytest.raises(XloomError) as raised:
        device_of(found, mixtures=mixtures)
    return raised.value


def test_cpu_and_cuda_are_told_apart() -> None:
    assert device_of(platform(PlatformEnum.CPU), mixtures=True) == "cpu"
    assert device_of(platform(PlatformEnum.CUDA), mixtures=True) == "cuda"


def test_a_build_for_gpus_without_a_driver_says_so() -> None:
    error = refusal(UnspecifiedPlatform())
    assert error.code == "device_missing"
    assert "driver" in error.message
    assert "nvidia-smi" in error.cure


def test_vllm_without_a_driver_is_the_platform_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own detection, with its CUDA build's version and a machine whose NVML does not load, as here."""
    import vllm.platforms as platforms

    monkeypatch.setattr(platforms, "vllm_version_matches_substr", lambda substr: False)
    assert platforms.resolve_current_platform_cls_qualname() == "vllm.platforms.interface.UnspecifiedPlatform"


def test_a_build_for_nvidia_on_amd_says_so() -> None:
    error = refusal(platform(PlatformEnum.ROCM))  # this torch is not built for ROCm either
    assert error.code == "device_missing"
    assert "AMD" in error.message


def test_a_process_that_was_given_no_gpu_says_so() -> None:
    error = refusal(platform(PlatformEnum.CUDA, devices=0))
    assert error.code == "device_missing"
    assert "replicas.gpus" in error.cure


@pytest.mark.parametrize(
    ("kind", "name"), [(PlatformEnum.TPU, "tpu"), (PlatformEnum.XPU, "xpu"), (PlatformEnum.OOT, "metal")]
)
def test_mixtures_are_refused_where_lora_has_no_gate(kind: PlatformEnum, name: str) -> None:
    found = platform(kind, name=name)
    error = refusal(found, mixtures=True)
    assert error.code == "unsupported_by_backend"
    assert name in error.message
    assert device_of(found, mixtures=False) == "cuda"  # adapters by name are vLLM's own
