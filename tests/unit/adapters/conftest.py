"""A tiny base model and its adapters, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import ATTENTION, tiny_adapter, tiny_bundle, tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("store") / "base", "llama")


@pytest.fixture(scope="session")
def lora(base: Path) -> Path:
    return tiny_adapter(base.parent / "lora", base, rank=4, targets=ATTENTION)


@pytest.fixture(scope="session")
def other_lora(base: Path) -> Path:
    return tiny_adapter(base.parent / "other", base, rank=4, targets=ATTENTION, seed=7)


@pytest.fixture(scope="session")
def bundle(base: Path) -> Path:
    return tiny_bundle(base.parent / "bundle", base)
