"""Mixtures on the architectures that vLLM runs LoRA on: PEFT's tokens, in a batch with the base model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..models import ARCHITECTURES, MORE_ARCHITECTURES

# Four are in test_parity, with a grid of options; vLLM 0.32's experts want Triton on a CPU as soon as LoRA is on.
ELSEWHERE = ("llama", "mistral", "qwen2", "qwen3", "mixtral")
HERE = [*(name for name in ARCHITECTURES if name not in ELSEWHERE), *MORE_ARCHITECTURES]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """By architecture; one process for all, which imports vLLM once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.architectures", *HERE],
        cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True, timeout=590, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["architecture"]: line for line in lines}


@pytest.mark.parametrize("architecture", HERE)
def test_the_mixture_gives_pefts_tokens_and_log_probabilities(
    reports: dict[str, dict[str, Any]], architecture: str
) -> None:
    answers = reports[architecture]["answers"]
    assert set(answers) == {"mixture-0", "mixture-1", "base-0", "base-1"}
    for name, answer in answers.items():
        assert answer["equal"], name
        assert answer["apart"] < 1e-3, name
        assert (answer["effect"] > 0.05) == name.startswith("mixture")


@pytest.mark.parametrize("architecture", HERE)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(reports: dict[str, dict[str, Any]], architecture: str) -> None:
    # The whole checkpoint was taken, tied heads and all: else there would be no answers above.
    refused = reports[architecture]["refused"]
    assert len(refused) == 3
    for name, said in refused.items():
        assert "not initialized from" in said, name
