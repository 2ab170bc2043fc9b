"""Perplexity on held-out text, before and after, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from xloom.quantization import calibration
from xloom.quantization.checkpoint import load_dequantised

WINDOWS = 64
BATCH = 8  # windows


def held_out_windows(model: Path, text: str, count: int = WINDOWS) -> list[list[int]]:
    """Windows of tokens that no calibration on `text` has seen. Raises `XloomError` (no_calibration)."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    length = min(calibration.LENGTH, AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)
    texts = calibration.documents(text, held_out=True)
    return calibration.windows(texts, calibration.encoder(tokenizer), count, length)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of a token."""
    total, count = 0.0, 0
    length = len(windows[0])
    whole = [window for window in windows if len(window) == length]
    for start in range(0, len(whole), BATCH):
        ids = torch.tensor(whole[start : start + BATCH])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def model_perplexity(folder: Path, windows: Sequence[Sequence[int]]) -> float:
    """The perplexity of a plain or quantised folder, in float32; what the scheme rounds at run time is rounded here."""
    from transformers import AutoModelForCausalLM

    if (folder / "xloom_quantised.json").is_file():
        return perplexity(load_dequantised(folder), windows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model.eval()
    return perplexity(model, windows)
