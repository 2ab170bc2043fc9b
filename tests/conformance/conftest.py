"""Each backend under test is started once a module, on the same tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xloom.engines.base import LLMBackend
from xloom.engines.mistralrs import folder as mistralrs_folder
from xloom.protocol import XloomError

from ..models import tiny_model
from .served import Served, backend_class, backend_names


def usable(name: str) -> type[LLMBackend]:
    """The backend's class; skips the test where it can't run here."""
    try:
        found = backend_class(name)
    except XloomError as error:
        pytest.skip(str(error))
    missing = found.missing()
    if missing is not None:
        pytest.skip(f"{name}: {missing}")
    return found


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models leave nothing in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mistralrs_folder, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model every backend serves, in float32."""
    return tiny_model(tmp_path_factory.mktemp("conformance") / "model", "llama")


@pytest.fixture(scope="module", params=backend_names())
def served(request: pytest.FixtureRequest, model: Path) -> Iterator[Served]:
    """A started engine of each backend in turn."""
    found = usable(request.param)
    engine = Served(found, model, xlora=found.device() in found.capabilities().xlora)
    yield engine
    engine.close()
