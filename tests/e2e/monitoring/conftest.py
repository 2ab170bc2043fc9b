"""One watched cluster for all tests of this folder, after a load in which everything has happened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from xloom.observability import table
from xloom_dashboards.expressions import substituted
from xloom_dashboards.shared import REPLICAS_CHANGED

from .adapters import write_adapter
from .traffic import ADDED, Load, adapters_come_and_go, refused_requests
from .watched import SMALL, Watched, watched


@dataclass(frozen=True)
class Past:
    """What Prometheus has seen: from when to when (seconds since the epoch), and where to ask it."""

    watched: Watched
    start: float
    end: float


@pytest.fixture(scope="package")
def past(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    """A queue brings a second replica, calm takes one away, the last one is killed at work.

    On the way requests and an adapter are refused, and another adapter comes and goes.
    """
    folder = tmp_path_factory.mktemp("watched")
    with watched(folder, SMALL) as made:
        with Load(made.endpoint, lanes=2, length=100):
            refused_requests(made.endpoint)
            adapters_come_and_go(made.endpoint, write_adapter(folder / ADDED, 8))
        with Load(made.endpoint, lanes=12, length=500):
            made.wait_preempted()
            made.wait_replicas(2)
            made.wait_seen(substituted(REPLICAS_CHANGED.expr, {}))
        with Load(made.endpoint, lanes=2, length=150):
            made.wait_replicas(1)
            with Load(made.endpoint, lanes=2, length=500):
                made.kill_busy()  # its health check fails, and Serve starts another, where its requests go on
                made.wait_seen(f"ray_{table.REPLAYS.name}")
        yield Past(made, made.started, time.time())
