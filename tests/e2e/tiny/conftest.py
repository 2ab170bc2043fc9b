"""One `xloom serve` of the tiny model for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..served import Served
from ..weights import Weights, settings_for


@pytest.fixture(scope="package")
def server(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """At its end, Ctrl-C must stop it in time and leave nothing behind."""
    served = Served(tmp_path_factory.mktemp("served"), settings_for(weights))
    served.wait_ready()
    yield served
    served.stop()
