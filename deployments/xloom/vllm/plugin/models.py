"""X-LoRA model classes, made from vLLM's own by one function. Attribute `XLora<Architecture>` for each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

# `_VLLM_MODELS`: architecture -> (module, class), vLLM 0.32.
from vllm.model_executor.models.registry import ModelRegistry

from xloom.vllm.plugin import ARCHITECTURES, XLORA_PREFIX
from xloom.vllm.plugin.passes import TwoPass


def make_xlora_class(base: type[nn.Module]) -> type[nn.Module]:
    """Subclass a vLLM causal LM so that batches with X-LoRA tokens run the scaling pass first.

    The base class must keep its decoder in attention layers registered by name, and return the hidden states
    after the final norm `[num_tokens, hidden]` from `forward`, as vLLM's causal LMs do.
    """

    class XLoraModel(base):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            # Not a submodule: it holds no weights, and shares the attention layers it wraps.
            object.__setattr__(self, "two_pass", TwoPass(vllm_config))

        def forward(
            self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            def run() -> torch.Tensor:
                hidden: torch.Tensor = super(XLoraModel, self).forward(input_ids, positions, *args, **kwargs)
                return hidden

            hidden_states: torch.Tensor = self.two_pass.run(run)
            return hidden_states

    XLoraModel.__name__ = XLoraModel.__qualname__ = XLORA_PREFIX + base.__name__
    XLoraModel.__module__ = __name__
    return XLoraModel


def __getattr__(name: str) -> type[nn.Module]:
    architecture = name.removeprefix(XLORA_PREFIX)
    if architecture == name or architecture not in ARCHITECTURES:
        raise AttributeError(name)
    base = ModelRegistry.models[architecture].load_model_cls()
    made = make_xlora_class(base)
    made.__name__ = made.__qualname__ = name
    globals()[name] = made
    return made
