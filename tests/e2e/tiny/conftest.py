"""One `xloom serve` of the tiny model for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..served import ADMIN_KEY, API_KEY, Served
from ..weights import Weights, settings_for

MIXTURES = [
    {"name": "arrow", "adapters": ["alpha", "beta"], "top_k": 1},
    {"name": "weighted", "adapters": ["alpha", "beta"], "routing": "fixed", "weights": {"alpha": 1}},
]


@pytest.fixture(scope="package")
def server(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """At its end, Ctrl-C must stop it in time and leave nothing behind."""
    keys = {"XLOOM_API_KEY": API_KEY, "XLOOM_ADMIN_KEY": ADMIN_KEY}
    settings = settings_for(weights, router={}, mixtures=MIXTURES)
    served = Served(tmp_path_factory.mktemp("served"), settings, **keys)
    served.wait_ready()
    yield served
    served.stop()


@pytest.fixture
def names_as_before(server: Served) -> Iterator[None]:
    """A test leaves the names as they were."""
    before = server.names()
    yield
    for name in server.names():
        if name not in before:
            assert server.unload(name).status_code == 200
    assert server.names() == before
    server.wait_idle()
