"""The Adapter store board: what is in the store, what is asked of it, and what it hands to replicas."""

from __future__ import annotations

from xloom.observability import table
from xloom_dashboards.board import SCOPE, Board, Row
from xloom_dashboards.panel import Graph, Query, Stat, Table
from xloom_dashboards.promql import aggregate, or_zero, share, total
from xloom_dashboards.shared import MARKS, PLACE

_HIT = 'outcome="hit"'


def _hits(metric: table.Metric) -> str:
    """The share of lookups that were hits; none at all is no share."""
    return share(or_zero(SCOPE.rate(metric, _HIT)), SCOPE.rate(metric))


def _all_hits(metric: table.Metric) -> str:
    """The same since the processes started, so that rare lookups have a figure too."""
    return share(or_zero(total(SCOPE.series(metric, _HIT))), total(SCOPE.series(metric)))


_NOW = Row("Now", (
    Stat(
        title="Adapters", unit="none", text="Adapters (lora) and bundles (xlora) in the store.",
        queries=(Query(aggregate("max", SCOPE.series(table.STORE_ENTRIES), ("kind",)), "{{kind}}"),), width=6,
    ),
    Stat(
        title="Version", unit="none",
        text="Of the desired state: one more with each change. No value: the store does not report (XloomStoreDown).",
        queries=(Query(f"max({SCOPE.series(table.STORE_VERSION)})"),), width=6,
    ),
    Stat(
        title="Node caches", unit="percentunit",
        text="Share of lookups in nodes' caches that were hits, since the replicas started.",
        queries=(Query(_all_hits(table.CACHE_READS)),), width=6,
    ),
    Stat(
        title="In the object store", unit="bytes", steps=((1.8e9, "orange"),),
        text="Weights that Ray's object store holds for replicas to come; the oldest go at 2 GiB.",
        queries=(Query(f"max({SCOPE.series(table.STORE_SHARED_BYTES)})"),), width=6,
    ),
))  # fmt: skip

_CHANGES = Row("Changes", (
    Graph(
        title="Version", unit="none", stepped=True,
        text="Of the desired state. Each step is an adapter that came, changed or went.",
        queries=(Query(f"max({SCOPE.series(table.STORE_VERSION)})", "version"),),
    ),
    Graph(
        title="Entries", unit="none", stepped=True, stacked=True,
        text="Adapters and bundles over time.",
        queries=(Query(aggregate("max", SCOPE.series(table.STORE_ENTRIES), ("kind",)), "{{kind}}"),),
    ),
    Table(
        title="Changes by outcome", unit="none", value="Times",
        text="Changes asked of the store since it started: ok, or the code of the error. docs/errors.md has each cure.",
        queries=(Query(total(SCOPE.series(table.STORE_CHANGES), ("action", "outcome"))),),
    ),
    Graph(
        title="Changes", unit="none", stacked=True, width=24, height=6,
        text="Changes asked of the store, by action and outcome.",
        queries=(
            Query(
                total(f"increase({SCOPE.series(table.STORE_CHANGES)}[$__rate_interval])", ("action", "outcome")),
                "{{action}}: {{outcome}}",
            ),
        ),
    ),
))  # fmt: skip

_WEIGHTS = Row("Weights", (
    Graph(
        title="Fetches by replicas", unit="ops", stacked=True, width=6,
        text="hit: the object store had the weights; miss: they were read from the store's disk.",
        queries=(Query(SCOPE.rate(table.STORE_FETCHES, by=("outcome",)), "{{outcome}}"),),
    ),
    Graph(
        title="Handed to replicas", unit="Bps", width=6,
        text="Bytes of weights a second. Replicas that start or adapters that are added fetch; traffic does not.",
        queries=(Query(SCOPE.rate(table.STORE_FETCHED_BYTES), "bytes"),),
    ),
    Graph(
        title="Hits", unit="percentunit", highest=1.0, width=6,
        text="Share of lookups in nodes' caches, and of fetches from the store, that found the weights at hand.",
        queries=(Query(_hits(table.CACHE_READS), "node cache"), Query(_hits(table.STORE_FETCHES), "object store")),
    ),
    Graph(
        title="In the object store", unit="bytes", width=6,
        text="Bytes of weights that Ray's object store holds.",
        queries=(Query(f"max({SCOPE.series(table.STORE_SHARED_BYTES)})", "bytes"),),
    ),
    Table(
        title="Lookups in nodes' caches", unit="none", value="Times", width=12, height=6,
        text="Since the replicas started: hit, or miss and fetched from the store.",
        queries=(Query(total(SCOPE.series(table.CACHE_READS), ("outcome",))),),
    ),
    Table(
        title="All fetches", unit="none", value="Times", width=12, height=6,
        text="Since the store started: hit, or miss and read from disk.",
        queries=(Query(total(SCOPE.series(table.STORE_FETCHES), ("outcome",))),),
    ),
))  # fmt: skip

STORE = Board(
    uid="xloom-store",
    title="xloom / Adapter store",
    text="What the adapter store holds, what is asked of it, and the weights it hands to replicas.",
    rows=(_NOW, _CHANGES, _WEIGHTS),
    variables=PLACE,
    marks=MARKS,
)
