"""Every expression of every panel, variable, mark and alert has data from a cluster that has seen everything happen."""

from __future__ import annotations

import re
import time

import pytest

from xloom_dashboards.boards import BOARDS
from xloom_dashboards.expressions import Expression, expressions, metrics_in, substituted

from .conftest import Past
from .prometheus import PROMETHEUS, SCRAPE_S
from .promql import selectors, unconditional

pytestmark = [pytest.mark.slow, PROMETHEUS]

RATE_S = 5 * SCRAPE_S
WAIT_S = 40.0  # from the last request until all that happened has been exported and scraped
ALL = list(expressions(rate_interval=f"{RATE_S}s", span="5m"))
# Events that can't be had here. All others are produced, whatever the boards say of them.
NOT_PRODUCED = {"a node has a GPU": "this machine's tests run on CPU"}
LEGENDS = sorted(
    {(query.expr, query.legend, query.event) for board in BOARDS for panel in board.panels() for query in panel.queries}
)


def produced(event: str) -> bool:
    """Whether what an expression waits for has happened."""
    return event not in NOT_PRODUCED


def until_there(past: Past, asked: str) -> list[dict[str, object]]:
    """An expression's series since the start; waits for them while the newest figures may still be on their way."""
    while True:
        found = past.watched.prometheus.between(asked, past.start, time.time())
        if found or time.time() > past.end + WAIT_S:
            return found
        time.sleep(SCRAPE_S / 2)


@pytest.mark.parametrize("expression", ALL, ids=lambda each: f"{each.owner}, {each.title}")
def test_an_expression_has_data(past: Past, expression: Expression) -> None:
    if not produced(expression.on_event):
        past.watched.prometheus.get("query", query=expression.expr)  # Prometheus takes it
        return
    asked = unconditional(expression.expr) if expression.owner == "alerts" else expression.expr
    assert until_there(past, asked), f"no data: {asked}\nasks for: {', '.join(selectors(asked))}"


@pytest.mark.parametrize(
    "name", sorted({name for each in ALL if produced(each.on_event) for name in metrics_in(each.expr)})
)
def test_a_metric_is_exported(past: Past, name: str) -> None:
    """Where an expression has a value anyhow, as with `or vector(0)`, a renamed metric would not be missed."""
    assert until_there(past, name), f"nobody exports {name}"


@pytest.mark.parametrize(("expr", "legend", "event"), [each for each in LEGENDS if "{{" in each[1]])
def test_a_legend_names_labels_that_are_there(past: Past, expr: str, legend: str, event: str) -> None:
    if not produced(event):
        return
    values = {"__rate_interval": f"{RATE_S}s", "__range": "5m"}
    found = until_there(past, substituted(expr, values))
    for label in re.findall(r"\{\{(\w+)}}", legend):
        assert any(label in series["metric"] for series in found), f"no {label} in {expr}"  # type: ignore[operator]


def test_what_is_not_produced_is_asked_for() -> None:
    """The list of events above holds no more than it must."""
    assert set(NOT_PRODUCED) <= {each.on_event for each in ALL}
