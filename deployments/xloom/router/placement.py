"""Which replica takes a request: a pure function of what is known about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xloom.protocol import EngineStats

AFFINITY = 4.0  # requests of load a replica may have more because it holds the adapter already
FULL_PAGES = 0.9  # share of KV pages in use above which new requests preempt old ones
FULL_COST = 16.0  # requests of load that full KV pages count for


@dataclass(frozen=True)
class Candidate:
    """One replica, as the router sees it now."""

    replica_id: str
    stats: EngineStats  # of its latest report
    own: int  # this router's requests there now
    own_at_report: int  # and when the report came
    draining: bool = False
    has_adapter: bool = True  # holds the request's adapter; True for the base model


def cost(candidate: Candidate) -> float:
    """Requests of load; the lowest takes the request.

    Reports are up to half a second old, so what this router has sent is counted exactly and only the
    other routers' share is taken from the report. Waiting requests count twice: they have a queue before them.
    """
    stats = candidate.stats
    others = max(0, stats.running + stats.waiting - candidate.own_at_report)
    load = candidate.own + others + stats.waiting
    full = FULL_COST if stats.kv_occupancy >= FULL_PAGES else 0.0
    return load + full + (0.0 if candidate.has_adapter else AFFINITY)


def choose(candidates: Sequence[Candidate], turn: int) -> str | None:
    """The replica's id, or None when none may take requests; `turn` counts up, and breaks ties in rotation."""
    open_ones = [candidate for candidate in candidates if not candidate.draining]
    if not open_ones:
        return None
    costs = [cost(candidate) for candidate in open_ones]
    lowest = min(costs)
    best = [candidate for candidate, value in zip(open_ones, costs, strict=True) if value == lowest]
    return best[turn % len(best)].replica_id
