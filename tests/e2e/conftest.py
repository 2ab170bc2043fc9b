"""What is served, and PEFT's answers to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from ..models import load_model, peft_greedy, peft_lora, peft_xlora
from .weights import Oracle, Weights, make_weights


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def oracle(weights: Weights) -> Iterator[Oracle]:
    """PEFT's greedy tokens in float32: `oracle(name, prompt, count)`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @cache
    def model(name: str) -> torch.nn.Module:
        if name == "base":
            return load_model(weights.base)
        if name == "blend":
            return peft_xlora(weights.base, weights.bundle)
        return peft_lora(weights.base, weights.adapters[name])

    @cache
    def answer(name: str, prompt: tuple[int, ...], count: int) -> list[int]:
        return peft_greedy(model(name), prompt, count)

    yield answer
    torch.set_num_threads(threads)
