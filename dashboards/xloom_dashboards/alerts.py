"""The one table of alerts: the rule files, the chart and the runbooks take them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xloom.observability import table
from xloom_dashboards import upstream
from xloom_dashboards.failures import failed_share, server_error_share
from xloom_dashboards.promql import Scope, aggregate, or_zero, share, total

# Markers: the chart puts its release's labels and limit in their place, the plain rules nothing and the default.
SCOPE_MARK = "SCOPE"
QUEUE_MARK = "QUEUE_LIMIT"
QUEUE_LIMIT = "16"  # twice the default of replicas.target_queue_depth

_IN = Scope((SCOPE_MARK,), window="5m")
_SLOW = "15m"
_SCALES = "replicas.max is above replicas.min"


@dataclass(frozen=True)
class Alert:
    """One alert: it fires when `signal condition` has held for a time."""

    name: str  # its runbook is the heading of this name in docs/monitoring.md
    signal: str  # with markers; empty where the condition is the whole
    condition: str
    hold: str  # Prometheus' `for`
    severity: Literal["critical", "warning"]
    summary: str
    on_event: str  # what makes it fire
    signal_event: str = ""  # what the signal needs beyond its metrics' own events

    @property
    def expr(self) -> str:
        """The whole expression, with markers."""
        return f"{self.signal} {self.condition}".strip()

    @property
    def plain_expr(self) -> str:
        """The whole expression, for any Prometheus."""
        return plain(self.expr)

    @property
    def plain_signal(self) -> str:
        """What is compared, for any Prometheus."""
        return plain(self.signal)

    @property
    def anchor(self) -> str:
        """Of its section in docs/monitoring.md."""
        return self.name.lower()


def plain(expr: str) -> str:
    """An expression without markers."""
    expr = expr.replace(f"{{{SCOPE_MARK}}}", "").replace(f"{SCOPE_MARK},", "")
    return expr.replace(QUEUE_MARK, QUEUE_LIMIT)


def _first_or_more(metric: table.Metric, *matchers: str, by: tuple[str, ...], window: str) -> str:
    """How often something happened: a series that is new counts from nothing, which `increase` does not see."""
    series = _IN.series(metric, *matchers)
    grown = total(f"increase({series}[{window}])", by)
    return f"({grown} > 0) or ({total(series, by)} unless {total(f'{series} offset {window}', by)})"


_WANTED = f"max({_IN.series(table.SCALING_WANTED)})"
_RUNNING = f"max({_IN.series(table.SCALING_CURRENT)})"

ALERTS: tuple[Alert, ...] = (
    Alert(
        "XloomEndpointDown", f"absent({_IN.series(table.ROUTER_IN_FLIGHT)})", "", "5m", "critical",
        "No router reports.", "no router runs", "no router runs",
    ),
    Alert(
        "XloomNoReplica", f"max({_IN.series(table.ROUTER_REPLICAS)})",
        # Scaled to zero with nobody waiting is not a fault.
        f"== 0 unless on () ({_WANTED} == 0 and on () max({_IN.series(table.ROUTER_WAITING)}) == 0)",
        "5m", "critical", "Routers are connected to no replica.", "the last replica is gone",
    ),
    Alert(
        # The deployment's status, not a replica's own gauge: Serve replaces a replica that fails, and its series ends.
        "XloomReplicaUnhealthy",
        aggregate("min", _IN.series(upstream.DEPLOYMENT_STATUS, 'application="xloom"'), ("deployment",)),
        "< 3", "5m", "warning",
        "Ray Serve finds the {{ $labels.deployment }} deployment unhealthy.", "health checks or starts keep failing",
    ),
    Alert(
        "XloomStoreDown", f"absent({_IN.series(table.STORE_VERSION)})", "", "5m", "warning",
        "The adapter store does not report.", "the adapter store is gone", "the adapter store is gone",
    ),
    Alert(
        "XloomRequestsFailing", failed_share(_IN), "> 0.05", "10m", "critical",
        "{{ $value | humanizePercentage }} of requests end with an error.",
        "requests fail in engines",
    ),
    Alert(
        "XloomServerErrors", server_error_share(_IN), "> 0.05", "10m", "warning",
        "{{ $value | humanizePercentage }} of answers are 5xx errors.", "answers have a 5xx status",
    ),
    Alert(
        "XloomFirstTokenSlow", _IN.quantile(0.99, table.TIME_TO_FIRST_TOKEN), "> 10",
        "15m", "warning", "One request in a hundred waits {{ $value | humanizeDuration }} for its first token.",
        "first tokens take longer than 10 s",
    ),
    Alert(
        "XloomQueueGrowing", f"avg({aggregate('max', _IN.series(table.REPLICA_WAITING), ('replica',))})",
        f"> {QUEUE_MARK}", "10m", "warning", "Twice as many requests wait as replicas.target_queue_depth allows.",
        "more requests come than engines can take",
    ),
    Alert(
        "XloomPagesExhausted",
        "min({} / {})".format(
            aggregate("max", _IN.series(table.KV_PAGES_USED), ("replica",)),
            aggregate("max", _IN.series(table.KV_PAGES_TOTAL), ("replica",)),
        ),
        "> 0.95", "10m", "warning", "Every replica has less than 5 % of its KV pages free.", "KV pages are used up",
    ),
    Alert(
        "XloomPreemptions",
        share(or_zero(_IN.rate(table.PREEMPTIONS, window=_SLOW)), _IN.rate(table.REQUESTS, window=_SLOW)),
        "> 0.05", "15m", "warning", "{{ $value | humanizePercentage }} of requests lose their KV pages to others.",
        "engines run out of KV pages",
    ),
    Alert(
        "XloomAtReplicaLimit", f"max({_IN.series(table.SCALING_PRESSURE)})",
        f"> 1 and on () {_WANTED} <= {_RUNNING}", "15m", "warning",
        "Load is above the autoscaler's targets, and no more replicas are allowed.",
        "load is above the targets at replicas.max", _SCALES,
    ),
    Alert(
        "XloomReplicasPending", f"{_WANTED} - {_RUNNING}", "> 0", "15m", "warning",
        "{{ $value }} replicas that the autoscaler wants do not run.", "no node has room for a replica", _SCALES,
    ),
    Alert(
        "XloomReplays",
        share(or_zero(_IN.rate(table.REPLAYS, window=_SLOW)), _IN.rate(table.REQUESTS, window=_SLOW)),
        "> 0.05", "15m", "warning", "{{ $value | humanizePercentage }} of requests had to go on at another replica.",
        "replicas die, drain or refuse while they have requests",
    ),
    Alert(
        "XloomAdapterRefused", _first_or_more(table.ADAPTER_SWAPS, 'action="refused"', by=("model",), window=_SLOW),
        "", "0m", "warning",
        "An engine refuses the adapter {{ $labels.model }}.",
        "an engine refuses an adapter", "an engine refuses an adapter",
    ),
)  # fmt: skip
