"""The base model a router is trained over: a Hugging Face causal model, in the precision that suits its device."""

from __future__ import annotations

from typing import Any

import torch

from xloom.engines.transformers.checkpoint import read_model
from xloom.engines.transformers.model import choose_device, choose_dtype
from xloom.settings import ModelSettings


def load_base(model: ModelSettings, device: str | None) -> Any:
    """The model on its device; float32 on a CPU, whose gradients are to be exact, else half precision.

    Raises `XloomError`: model_not_loadable, device_missing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the terminal shows ours
    place = choose_device(device)
    dtype = torch.float32 if place.type == "cpu" else choose_dtype("auto", place)
    return read_model(model, dtype=dtype).to(place)
