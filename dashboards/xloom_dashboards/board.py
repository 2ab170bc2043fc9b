"""A board: rows of panels, the variables that narrow them, what is marked on them, and the JSON Grafana takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xloom.observability.table import Metric
from xloom_dashboards.panel import SOURCE, Json, Panel
from xloom_dashboards.promql import Scope

SCHEMA = 42  # of Grafana's dashboard model; older Grafanas (10 and up) read it too
COLUMNS = 24
TAG = "xloom"

# What every board can be narrowed to. Outside Kubernetes there is no ray_io_cluster, which `.*` matches as well.
SCOPE = Scope(('SessionName=~"$session"', 'ray_io_cluster=~"$cluster"'))


@dataclass(frozen=True)
class Row:
    """A heading and the panels below it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A label whose values can be chosen, all by default."""

    name: str
    title: str
    metric: Metric | str  # where its values come from
    label: str
    matchers: tuple[str, ...] = ()  # of variables before it

    @property
    def series(self) -> str:
        """What its values are read from."""
        name = self.metric if isinstance(self.metric, str) else self.metric.exported
        if isinstance(self.metric, Metric) and self.metric.kind == "histogram":
            name += "_count"
        return f"{name}{{{','.join(self.matchers)}}}" if self.matchers else name

    def json(self) -> Json:
        """The variable in Grafana's model."""
        query = f"label_values({self.series}, {self.label})"
        return {
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "datasource": SOURCE,
            "definition": query,
            "hide": 0,
            "includeAll": True,
            "label": self.title,
            "multi": True,
            "name": self.name,
            "options": [],
            "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
            "refresh": 2,
            "regex": "",
            "skipUrlSync": False,
            "sort": 1,
            "type": "query",
        }


@dataclass(frozen=True)
class Mark:
    """Something that happened, as vertical lines on all panels: the times at which an expression has a value."""

    name: str
    text: str
    expr: str
    color: str
    event: str

    def json(self) -> Json:
        """The annotation in Grafana's model."""
        return {
            "datasource": SOURCE,
            "enable": True,
            "expr": self.expr,
            "hide": False,
            "iconColor": self.color,
            "name": self.name,
            "step": "60s",
            "textFormat": self.text,
            "titleFormat": self.name,
            "useValueForTime": False,
        }


@dataclass(frozen=True)
class Board:
    """A Grafana dashboard. The uid stays: links and what is published hang on it."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...]
    marks: tuple[Mark, ...]

    @property
    def file(self) -> str:
        """What its JSON file is called."""
        return f"{self.uid}.json"

    def panels(self) -> Iterator[Panel]:
        """All panels, in order."""
        for row in self.rows:
            yield from row.panels

    def queries(self) -> Iterator[tuple[str, str, str]]:
        """Title, expression and event of every query: panels, then variables, then marks."""
        for panel in self.panels():
            for query in panel.queries:
                yield panel.title, query.expr, query.event
        for variable in self.variables:
            yield f"${variable.name}", variable.series, ""
        for mark in self.marks:
            yield mark.name, mark.expr, mark.event

    def json(self) -> Json:
        """The board in Grafana's model, without the id and version that are the server's."""
        return {
            "annotations": {"list": [_BUILT_IN, *(mark.json() for mark in self.marks)]},
            "description": self.text,
            "editable": True,
            "fiscalYearStartMonth": 0,
            "graphTooltip": 1,
            "links": [_LINKS],
            "panels": list(self._placed()),
            "refresh": "30s",
            "schemaVersion": SCHEMA,
            "tags": [TAG],
            "templating": {"list": [_DATA_SOURCE, *(variable.json() for variable in self.variables)]},
            "time": {"from": "now-1h", "to": "now"},
            "timepicker": {},
            "timezone": "browser",
            "title": self.title,
            "uid": self.uid,
            "weekStart": "",
        }

    def _placed(self) -> Iterator[Json]:
        """Rows from top to bottom, panels from left to right, on to a new line where one is full."""
        number, y = 1, 0
        for row in self.rows:
            yield {
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "id": number,
                "panels": [],
                "title": row.title,
                "type": "row",
            }
            number, y, x, tallest = number + 1, y + 1, 0, 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    x, y, tallest = 0, y + tallest, 0
                yield panel.json(number, x, y)
                number, x, tallest = number + 1, x + panel.width, max(tallest, panel.height)
            y += tallest


_BUILT_IN: Json = {
    "builtIn": 1,
    "datasource": {"type": "grafana", "uid": "-- Grafana --"},
    "enable": True,
    "hide": True,
    "iconColor": "rgba(0, 211, 255, 1)",
    "name": "Annotations & Alerts",
    "type": "dashboard",
}

_LINKS: Json = {
    "asDropdown": False,
    "icon": "external link",
    "includeVars": True,
    "keepTime": True,
    "tags": [TAG],
    "targetBlank": False,
    "title": "xloom",
    "tooltip": "The other boards, at the same time and with the same choices",
    "type": "dashboards",
    "url": "",
}

_DATA_SOURCE: Json = {
    "current": {},
    "hide": 0,
    "includeAll": False,
    "label": "Data source",
    "multi": False,
    "name": "datasource",
    "options": [],
    "query": "prometheus",
    "refresh": 1,
    "regex": "",
    "skipUrlSync": False,
    "type": "datasource",
}
