"""Our in-situ quantisation as mistral.rs names it: round-to-nearest is its AFQ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.engines.base import IsqCase
from xloom.protocol import XloomError
from xloom.quantization.fitting import free_bytes

if TYPE_CHECKING:
    from xloom.settings import IsqSettings

logger = logging.getLogger(__name__)

# AFQ: each group of 64 input channels has its own scale and offset, rounded to nearest without calibration
# (mistralrs-quant/src/afq, 0.9). Its GGUF types (Q4K, ...) fail on batched prefill on CPU; HQQ fits its offsets, so it
# is not round-to-nearest; AWQ, GPTQ and SmoothQuant it has none of.
NAMES: dict[IsqCase, str] = {("rtn", bits): f"AFQ{bits}" for bits in (2, 4, 8)}
ISQ_CASES = frozenset(NAMES)
GROUP_SIZE = 64
SHARE = 0.5  # of the free memory, that the weights may take: the rest is for keys and values


def isq_name(isq: IsqSettings | None, model: Path) -> str | None:
    """What `Runner(in_situ_quant=...)` takes; None without quantisation. Raises `XloomError`."""
    if isq is None:
        return None
    bits = fitting_bits(model) if isq.bits == "auto" else isq.bits
    name = NAMES.get((isq.method, bits))
    if name is None:
        raise XloomError(
            "unsupported_by_backend",
            f"The backend 'mistralrs' can't do isq {isq.method} at {bits} bits.",
            "Set isq.method to rtn, or engine.backend to vllm.",
        )
    if "group_size" in isq.model_fields_set and isq.group_size != GROUP_SIZE:
        raise XloomError(
            "unsupported_setting",
            f"mistral.rs quantises in groups of {GROUP_SIZE}; isq.group_size is {isq.group_size}.",
            f"Set isq.group_size to {GROUP_SIZE}, or leave it out.",
        )
    return name


def fitting_bits(model: Path, free: int | None = None) -> int:
    """The most bits a weight with which the model takes at most half of the `free` bytes of memory."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))  # mostly 16 bits a weight
    free = free_bytes("cpu") if free is None else free
    bits = next((bits for bits in (8, 4) if weights * bits / 16 <= SHARE * free), 2)
    logger.warning("isq.bits auto: %d bits, for weights of %d MiB in %d MiB free", bits, weights >> 20, free >> 20)
    return bits
