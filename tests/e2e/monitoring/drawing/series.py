"""What a panel draws: its series, the time they span, and where they go."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Json = dict[str, Any]
Point = tuple[float, float]  # seconds since the epoch, value


@dataclass(frozen=True)
class Line:
    """One series of a panel."""

    name: str
    labels: dict[str, str]
    points: list[Point]  # without NaN

    @property
    def last(self) -> float:
        """The newest value."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Span:
    """The time that is drawn, and how far apart points are (seconds)."""

    start: float
    end: float
    step: float


Ask = Callable[[str], list[Json]]  # an expression with Grafana's variables -> series over the span


def legend(form: str, labels: dict[str, str]) -> str:
    """A series' name: Grafana's `{{label}}` filled in, or the labels themselves."""
    if form and form != "__auto":
        return re.sub(r"\{\{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), form)
    shown = ", ".join(f'{name}="{value}"' for name, value in labels.items() if name != "__name__")
    return f"{labels.get('__name__', '')}{{{shown}}}" if shown else labels.get("__name__", "Value")


def lines_of(panel: Json, ask: Ask, span: Span) -> list[Line]:
    """The data of all targets of a panel. An instant one has what is there at the end of the time, and nothing else."""
    found = []
    for target in panel.get("targets", []):
        for series in ask(target["expr"]):
            points = [(float(at), float(value)) for at, value in series["values"]]
            points = [point for point in points if math.isfinite(point[1])]
            gone = points and points[-1][0] < span.end - 1.5 * span.step
            if points and not (gone and target.get("instant")):
                name = legend(target.get("legendFormat", ""), series["metric"])
                found.append(Line(name, series["metric"], points))
    return found


@dataclass(frozen=True)
class Canvas:
    """A panel with its data, and its size in pixels."""

    panel: Json
    lines: list[Line]
    span: Span
    marks: list[float]  # when something happened
    width: float
    height: float

    @property
    def defaults(self) -> Json:
        """The panel's unit, limits, thresholds and the rest."""
        found: Json = self.panel["fieldConfig"]["defaults"]
        return found

    @property
    def unit(self) -> str:
        """Grafana's name of it."""
        return str(self.defaults.get("unit", "short"))


def stacked(found: list[Line], shares: bool) -> list[Line]:
    """Each line on top of those before it; as shares, of all together."""
    sums: dict[float, float] = {}
    for line in found:
        for at, value in line.points:
            sums[at] = sums.get(at, 0.0) + value
    below: dict[float, float] = {}
    made = []
    for line in found:
        points = []
        for at, value in line.points:
            below[at] = below.get(at, 0.0) + ((value / sums[at] if sums[at] else 0.0) if shares else value)
            points.append((at, below[at]))
        made.append(Line(line.name, line.labels, points))
    return made


def stretches(points: list[Point], step: float) -> Iterator[list[Point]]:
    """Points without a gap between them."""
    stretch = points[:1]
    for before, point in pairwise(points):
        if point[0] - before[0] > 1.5 * step:
            yield stretch
            stretch = []
        stretch.append(point)
    yield stretch


def corners(points: list[Point], stepped: bool) -> Iterator[Point]:
    """The points a line goes through; a stepped one keeps each value until the next point. One point alone is a dot."""
    yield points[0]
    if len(points) == 1:
        yield points[0]
    for before, point in pairwise(points):
        if stepped:
            yield point[0], before[1]
        yield point
