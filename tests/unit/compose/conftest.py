from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models import ATTENTION, MLP, tiny_adapter, tiny_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: threads cost more than they bring
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of every linear, of different ranks and scales."""
    root, targets = tmp_path_factory.mktemp("adapters"), ATTENTION + MLP
    return {
        "words": tiny_adapter(root / "words", llama, rank=4, alpha=8, targets=targets, seed=1, strength=0.3),
        "sums": tiny_adapter(root / "sums", llama, rank=2, alpha=2, targets=targets, seed=2, strength=0.3, rslora=True),
    }


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Text of two domains that no byte is common to."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    makers = {
        "words": lambda: "".join(rng.choice("abcdefgh") for _ in range(200)),
        "sums": lambda: "".join(rng.choice("0123456789+=") for _ in range(200)),
    }
    for name, make in makers.items():
        lines = (json.dumps({"text": make()}) for _ in range(64))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: str(folder / f"{name}.jsonl") for name in makers}
