"""Panels of a board: what they ask, how they look, and the JSON Grafana takes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from xloom_dashboards.expressions import event_of

Json = dict[str, Any]

SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
Step = tuple[float, str]  # from this value on, this colour
GREEN: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel."""

    expr: str
    legend: str = ""
    event: str = ""  # what must happen before it has data, where its metrics do not say so themselves


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What all kinds of panels have."""

    title: str
    text: str  # the description: what is shown, and what to make of it
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8  # columns, of 24
    height: int = 8
    steps: tuple[Step, ...] = GREEN  # thresholds above green
    lowest: float | None = None
    highest: float | None = None
    none: str = ""  # shown where a query has no series; empty: what must happen first, if anything must

    kind: ClassVar[str]
    form: ClassVar[str] = "time_series"
    instant: ClassVar[bool] = False

    def json(self, number: int, x: int, y: int) -> Json:
        """The panel in Grafana's model, at a place."""
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "datasource": SOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [self._target(index, query) for index, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
        }

    def _target(self, index: int, query: Query) -> Json:
        return {
            "datasource": SOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "format": self.form,
            "instant": self.instant,
            "legendFormat": query.legend or "__auto",
            "range": not self.instant,
            "refId": chr(ord("A") + index),
        }

    def _defaults(self) -> Json:
        steps: list[Json] = [{"color": "green", "value": None}]
        steps += [{"color": color, "value": value} for value, color in self.steps]
        found: Json = {
            "color": {"mode": "thresholds"},
            "mappings": [],
            "thresholds": {"mode": "absolute", "steps": steps},
            "unit": self.unit,
        }
        limits = {"min": self.lowest, "max": self.highest}
        if none := self.none or self._awaits():
            found["noValue"] = none
        return found | {key: value for key, value in limits.items() if value is not None}

    def _awaits(self) -> str:
        """Why there may be nothing, though all is well."""
        events = sorted({query.event or event_of(query.expr) for query in self.queries})
        return f"None until {'; '.join(events)}." if all(events) else ""

    def _options(self) -> Json:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Graph(Panel):
    """Lines over time, with a table of their values below."""

    kind: ClassVar[str] = "timeseries"
    stacked: bool = False
    stepped: bool = False  # for whole numbers that jump
    lowest: float | None = 0.0

    def _defaults(self) -> Json:
        found = super()._defaults()
        found["color"] = {"mode": "palette-classic"}
        mode = "normal" if self.stacked else "none"
        found["custom"] = {
            "axisPlacement": "auto",
            "drawStyle": "line",
            "fillOpacity": 40 if self.stacked else 8,
            "lineInterpolation": "stepAfter" if self.stepped else "linear",
            "lineWidth": 1,
            "pointSize": 4,
            "scaleDistribution": {"type": "linear"},
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"group": "A", "mode": mode},
            "thresholdsStyle": {"mode": "dashed" if self.steps else "off"},
        }
        return found

    def _options(self) -> Json:
        return {
            "legend": {
                "calcs": ["mean", "max"],
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


_REDUCED: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}


@dataclass(frozen=True, kw_only=True)
class Stat(Panel):
    """The value now, large. An instant query: the last value of what is gone would look like one of now."""

    kind: ClassVar[str] = "stat"
    instant: ClassVar[bool] = True
    width: int = 4
    height: int = 4
    names: dict[int, tuple[str, str]] | None = None  # values with a name and a colour

    def _defaults(self) -> Json:
        found = super()._defaults()
        if self.names:
            options = {
                str(value): {"color": color, "index": index, "text": text}
                for index, (value, (text, color)) in enumerate(self.names.items())
            }
            found["mappings"] = [{"type": "value", "options": options}]
        return found

    def _options(self) -> Json:
        return {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": _REDUCED,
            "showPercentChange": False,
            "textMode": "auto",
            "wideLayout": True,
        }


@dataclass(frozen=True, kw_only=True)
class Bars(Panel):
    """The value now of each series, side by side."""

    kind: ClassVar[str] = "bargauge"
    instant: ClassVar[bool] = True
    lowest: float | None = 0.0

    def _options(self) -> Json:
        return {
            "displayMode": "gradient",
            "maxVizHeight": 300,
            "minVizHeight": 16,
            "minVizWidth": 8,
            "namePlacement": "auto",
            "orientation": "horizontal",
            "reduceOptions": _REDUCED,
            "showUnfilled": True,
            "sizing": "auto",
            "valueMode": "color",
        }


@dataclass(frozen=True, kw_only=True)
class Heatmap(Panel):
    """A histogram over time: how many fell into each bucket. `unit` is that of the buckets."""

    kind: ClassVar[str] = "heatmap"
    form: ClassVar[str] = "heatmap"
    scheme: Literal["Oranges", "Blues", "Greens"] = "Oranges"

    def _defaults(self) -> Json:
        return {"custom": {"scaleDistribution": {"type": "linear"}}, "unit": self.unit}

    def _options(self) -> Json:
        return {
            "calculate": False,
            "cellGap": 1,
            "cellValues": {"unit": "reqps"},
            "color": {
                "exponent": 0.5,
                "fill": "dark-orange",
                "mode": "scheme",
                "reverse": False,
                "scale": "exponential",
                "scheme": self.scheme,
                "steps": 64,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": self.unit},
        }


@dataclass(frozen=True, kw_only=True)
class Table(Panel):
    """The newest value of each series as a row, its labels as columns."""

    kind: ClassVar[str] = "table"
    form: ClassVar[str] = "table"
    instant: ClassVar[bool] = True
    value: str = "Value"  # what the column of values is called

    def json(self, number: int, x: int, y: int) -> Json:
        """As any panel, without the column of times."""
        organise = {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": {"Value": self.value}}
        return super().json(number, x, y) | {"transformations": [{"id": "organize", "options": organise}]}

    def _defaults(self) -> Json:
        custom = {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}
        return super()._defaults() | {"custom": custom}

    def _options(self) -> Json:
        return {
            "cellHeight": "sm",
            "footer": {"countRows": False, "fields": "", "reducer": ["sum"], "show": False},
            "showHeader": True,
        }
