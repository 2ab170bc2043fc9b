"""Loads a Hugging Face causal model for the `transformers` backend: device, dtype, attention, and what it is like."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from xloom.engines.transformers.batch import ATTENTION, packs
from xloom.engines.transformers.checkpoint import read_model, reading
from xloom.protocol import XloomError

if TYPE_CHECKING:
    from torch import nn

    from xloom.settings import EngineSettings, ModelSettings

logger = logging.getLogger(__name__)

DEVICES = {"cuda": "cuda", "metal": "mps", "mps": "mps", "cpu": "cpu"}  # as settings name them -> as torch does
EXTRA_ARGS = ("device", "batching")


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what serving it needs to know."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    batching: bool  # requests run in one packed batch; False: one after another
    vocabulary: int  # tokens
    max_model_len: int  # tokens
    eos: tuple[int, ...]  # end-of-text tokens, the model's own

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules by their Hugging Face names."""
        return dict(self.model.named_modules())


def load_model(model: ModelSettings, engine: EngineSettings) -> LoadedModel:
    """Load the model from safetensors. Raises `XloomError`: model_not_loadable, unsupported_setting, and the like."""
    _check(engine)
    from transformers import AutoConfig

    device = choose_device(engine.extra_args.get("device"))
    dtype = choose_dtype(engine.dtype, device)
    if device.type == "cpu" and "ray" in sys.modules and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray sets OMP_NUM_THREADS to the actor's CPUs
    with reading(model.source):
        config = AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
        batching = bool(engine.extra_args.get("batching", True)) and packs(config)
    loaded = read_model(model, dtype=dtype, attn_implementation=ATTENTION if batching else None)
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or engine.max_model_len
    if limit < engine.max_model_len:
        logger.warning("max_model_len %d lowered to the model's own %d", engine.max_model_len, limit)
    if not batching:
        logger.warning("%s runs requests one after another: batching is not known to fit it", text.model_type)
    return LoadedModel(
        model=loaded.to(device).eval(),
        device=device,
        dtype=dtype,
        batching=batching,
        vocabulary=int(text.vocab_size),
        max_model_len=min(engine.max_model_len, limit),
        eos=_eos(loaded.generation_config),
    )


def _check(engine: EngineSettings) -> None:
    unknown = [name for name in engine.extra_args if name not in EXTRA_ARGS]
    if unknown:
        raise XloomError(
            "unknown_engine_argument",
            f"The transformers backend has no engine argument {unknown[0]!r}.",
            f"engine.extra_args takes: {', '.join(EXTRA_ARGS)}.",
        )
    if engine.tensor_parallel_size > 1:
        raise XloomError(
            "unsupported_setting",
            "The transformers backend runs on one device.",
            "Set engine.tensor_parallel_size to 1, or serve with engine.backend: vllm.",
        )


def choose_device(wanted: str | None) -> torch.device:
    """The device named, or CUDA, else Metal, else the CPU. Raises `XloomError` (device_missing)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted is None:
        return torch.device(next(name for name, there in available.items() if there))
    name, _, number = wanted.partition(":")
    kind = DEVICES.get(name)
    if kind is None or not available[kind]:
        there = ", ".join(name for name, kind in DEVICES.items() if name != "mps" and available[kind])
        raise XloomError("device_missing", f"There is no device {wanted!r} here.", f"Devices here: {there}.")
    return torch.device(f"{kind}:{number}" if number else kind)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype named, or for `auto` the half precision that the device computes in, else float32."""
    if wanted != "auto":
        named: torch.dtype = getattr(torch, wanted)
        return named
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    # As vllm/engine/arguments.py: a CPU without bfloat16 arithmetic emulates it, slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _eos(generation: Any) -> tuple[int, ...]:
    """The end-of-text tokens of a `transformers.GenerationConfig`."""
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        return ()
    return (int(found),) if isinstance(found, int) else tuple(int(token) for token in found)
