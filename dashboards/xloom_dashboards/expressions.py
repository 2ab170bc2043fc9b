"""Every PromQL expression of the boards and the alerts, ready to be asked of a Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from xloom.observability.table import METRICS

EVERYTHING = ".*"  # what a variable stands for when All is chosen
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_NAME = re.compile(r"\bray_(?!io_)\w+")  # ray_io_cluster is a label
_EVENTS = {metric.exported: metric.on_event for metric in METRICS if metric.on_event}


class Expression(NamedTuple):
    """One expression, without variables."""

    owner: str  # the board's uid, or "alerts"
    title: str  # of the panel, variable or annotation; the alert's name
    expr: str
    on_event: str  # what must happen before it has data; empty: plain traffic with every kind of model is enough


def expressions(
    rate_interval: str = "1m", span: str = "10m", values: dict[str, str] | None = None
) -> Iterator[Expression]:
    """All expressions of all boards, then those of the alerts.

    `rate_interval` and `span` stand for `$__rate_interval` and `$__range`; `values` for variables, `.*` for others.
    An alert gives two: its signal, which has a value whether or not something is wrong, and the whole condition.
    """
    from xloom_dashboards.alerts import ALERTS
    from xloom_dashboards.boards import BOARDS

    chosen = {"__rate_interval": rate_interval, "__range": span, "__interval": rate_interval} | (values or {})
    for board in BOARDS:
        for title, expr, event in board.queries():
            yield Expression(board.uid, title, substituted(expr, chosen), event or event_of(expr))
    for alert in ALERTS:
        if alert.condition:
            event = alert.signal_event or event_of(alert.signal)
            yield Expression("alerts", f"{alert.name}: signal", alert.plain_signal, event)
        yield Expression("alerts", alert.name, alert.plain_expr, alert.on_event)


def substituted(expr: str, values: dict[str, str]) -> str:
    """An expression with its variables filled in."""
    return _VARIABLE.sub(lambda found: values.get(found[1], EVERYTHING), expr)


def variables_in(text: str) -> set[str]:
    """The names of the variables a text uses."""
    return set(_VARIABLE.findall(text))


def metrics_in(expr: str) -> set[str]:
    """The names of the metrics an expression asks for, as Prometheus knows them."""
    return set(_NAME.findall(expr))


def family(name: str) -> str:
    """A histogram's name without the suffix of its parts."""
    return re.sub(r"_(bucket|count|sum)$", "", name)


def event_of(expr: str) -> str:
    """What must happen before all metrics of an expression have data."""
    events = {_EVENTS[family(name)] for name in metrics_in(expr) if family(name) in _EVENTS}
    return "; ".join(sorted(events))
