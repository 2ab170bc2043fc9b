from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.models import tiny_bundle, tiny_model
from xloom.mixtures.modules import linear_modules


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: threads cost more than they bring
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, made once for each architecture."""
    root = tmp_path_factory.mktemp("models")

    def make(architecture: str) -> Path:
        folder = root / architecture
        return folder if folder.exists() else tiny_model(folder, architecture)

    return make


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], Path]) -> Path:
    return model_of("llama")


@pytest.fixture(scope="session")
def shapes(llama: Path) -> dict[str, tuple[int, int]]:
    return linear_modules(str(llama))


@pytest.fixture
def bundle(tmp_path: Path, llama: Path) -> Path:
    """A fresh bundle in PEFT's format, to be broken at will."""
    return tiny_bundle(tmp_path / "bundle", llama)
