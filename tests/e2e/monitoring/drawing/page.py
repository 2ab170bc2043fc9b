"""A Grafana board with its data as one HTML page of inline SVG: layout, titles, units, thresholds, legends."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator

from .figures import bars, heatmap, stat, table
from .graph import graph
from .series import Ask, Canvas, Json, Span, lines_of
from .svg import shortened, text

WIDTH = 1600  # pixels
COLUMN, ROW, GAP, EDGE = (WIDTH - 16) / 24, 38, 8, 8  # a row of the grid is 30 pixels and a gap of 8, as in Grafana
KINDS: dict[str, Callable[[Canvas], Iterator[str]]] = {
    "bargauge": bars,
    "heatmap": heatmap,
    "stat": stat,
    "table": table,
    "timeseries": graph,
}
MARK_S = 60.0  # between two marks of a kind
STYLE = """
body {margin: 0; background: #111217; font-family: "DejaVu Sans", sans-serif; color: #ccccdc}
header {padding: 14px 10px 2px; font-size: 20px} header p {font-size: 12px; color: #8e8e99; margin: 6px 0 10px}
header span {font-size: 12px; border: 1px solid #34353b; padding: 3px 8px; margin-right: 8px; color: #9fa0ab}
main {position: relative} svg {position: absolute} text {font-family: inherit; fill: #ccccdc; font-size: 11px}
.dim {fill: #8e8e99} .title {font-size: 13px; font-weight: bold} .grid {stroke: #25262c; stroke-width: 1}
.row {position: absolute; font-size: 15px; padding: 8px 10px; font-weight: bold}
"""


def page(board: Json, ask: Ask, span: Span) -> str:
    """The whole board; `ask` gets expressions with Grafana's variables in them."""
    marked = (_onsets(series, span) for mark in _marks(board) for series in ask(mark["expr"]))
    marks = sorted({at for onsets in marked for at in onsets})
    bottom, drawn = 0.0, []
    for panel in board["panels"]:
        place = panel["gridPos"]
        x, y = EDGE + place["x"] * COLUMN, place["y"] * ROW
        width, height = place["w"] * COLUMN - GAP, place["h"] * ROW - GAP
        bottom = max(bottom, y + height + GAP)
        if panel["type"] == "row":
            title = html.escape(panel["title"])
            drawn.append(f'<div class="row" style="left:{x - EDGE}px;top:{y - 4}px">{title}</div>')
            continue
        found = lines_of(panel, ask, span)
        inner = "".join(_panel(Canvas(panel, found, span, marks, width, height)))
        size = f'width="{width:.1f}" height="{height:.1f}"'
        drawn.append(f'<svg style="left:{x:.1f}px;top:{y:.1f}px" {size}>{inner}</svg>')
    title = html.escape(board["title"])
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<header>{title}<p>{html.escape(board.get('description', ''))}</p>{_choices(board)}"
        f"<span>Last {(span.end - span.start) / 60:.0f} minutes</span></header>"
        f'<main style="height:{bottom:.0f}px;margin-top:10px">{"".join(drawn)}</main>'
    )


def height_of(board: Json) -> int:
    """The pixels the page is high."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    return int(rows * ROW) + 110


def _choices(board: Json) -> str:
    said = []
    for each in board.get("templating", {}).get("list", []):
        value = "Prometheus" if each["type"] == "datasource" else "All"
        said.append(f"<span>{html.escape(each.get('label') or each['name'])}: {value}</span>")
    return "".join(said)


def _marks(board: Json) -> list[Json]:
    return [each for each in board.get("annotations", {}).get("list", []) if "expr" in each]


def _onsets(series: Json, span: Span) -> Iterator[float]:
    """The first point of each stretch in which a mark's expression has a value; Grafana asks once a minute."""
    before = -math.inf
    for at, _ in series["values"]:
        if float(at) - before > max(MARK_S, 1.5 * span.step):
            yield float(at)
        before = float(at)


def _panel(canvas: Canvas) -> Iterator[str]:
    width, height = canvas.width, canvas.height
    yield f'<rect width="{width:.1f}" height="{height:.1f}" fill="#181b1f" stroke="#25262c" rx="2"/>'
    yield text(8, 20, canvas.panel["title"], extra='class="title"')
    if canvas.lines:
        yield from KINDS[canvas.panel["type"]](canvas)
    else:
        nothing = canvas.defaults.get("noValue", "No data")
        yield text(width / 2, height / 2, shortened(nothing, width), "middle", 'class="dim"')
