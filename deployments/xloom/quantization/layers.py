"""Whether a method that smooths knows a model's layers: asked before the weights are loaded. In the worker alone."""

from __future__ import annotations

from typing import Any

import torch

from xloom.protocol import XloomError
from xloom.quantization.job import Job


def check_layers(job: Job) -> None:
    """Raise `XloomError` (isq_unsupported_model) for a model in which the method would find nothing to smooth.

    Relied on: the modifiers' own mappings and `compressed_tensors.utils.match_modules_set`; llmcompressor 0.14.
    """
    if not job.recipe.smooths:
        return
    from compressed_tensors.utils import match_modules_set
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from torch.utils._pytree import tree_leaves
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(job.model, trust_remote_code=False), trust_remote_code=False
        )
    why = "it has none of the layers that the method looks for"
    found = 0
    try:
        if job.recipe.method == "awq":
            for mapping in get_layer_mappings_from_model(model):
                found += len(list(match_modules_set(model, (mapping.smooth_layer, *mapping.balance_layers))))
        else:
            for layers in SmoothQuantModifier()._infer_mappings_from_model(model):
                found += len(list(match_modules_set(model, tree_leaves(layers))))
    except ValueError as error:  # layers of which only some are there
        found, why = 0, str(error).strip().splitlines()[0]
    if not found:
        kind = type(model).__name__
        raise XloomError(
            "isq_unsupported_model",
            f"{job.recipe.method} does not know the layers of {job.model} ({kind}): {why}.",
            "Use isq.method gptq or rtn, which need no layers by name.",
        )
