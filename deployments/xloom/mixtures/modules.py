"""The linear modules of a base model: their names, order and shapes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from xloom.protocol import XloomError


@lru_cache(maxsize=8)
def _linear_modules(source: str, revision: str | None) -> tuple[tuple[str, tuple[int, int]], ...]:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        message = f"The base model {source!r} can't be read: {error}"
        raise XloomError("unreadable_model", message, "Name a local folder or hub id with a config.json.") from error
    return tuple(
        (name, (module.out_features, module.in_features))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )


def linear_modules(source: str, revision: str | None = None) -> dict[str, tuple[int, int]]:
    """Hugging Face name -> (out, in) of every `nn.Linear` of the model, `lm_head` included, in `modules()` order.

    Built on the meta device from the configuration alone. The order is that in which PEFT numbers X-LoRA's layers
    (peft.tuners.xlora.model.convert_layers_to_xlora). Raises `XloomError` (unreadable_model).
    """
    return dict(_linear_modules(source, revision))
