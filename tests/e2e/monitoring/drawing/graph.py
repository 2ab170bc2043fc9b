"""The panel of lines over time, with the table of their newest and greatest values below."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .series import Canvas, Line, corners, stacked, stretches
from .svg import PALETTE, TITLE, colour, line, shortened, text, times
from .units import ticks, written

AXIS, RIGHT, LEGEND_LINE = 68, 12, 17  # pixels
LEGEND_SHARE = 0.42  # of a panel's height, at most
BINARY = ("bytes", "binBps", "mbytes")


def graph(canvas: Canvas) -> Iterator[str]:
    """Lines, stacked or not, thresholds and marks."""
    span, width, found = canvas.span, canvas.width, canvas.lines
    custom = canvas.defaults.get("custom", {})
    mode = custom.get("stacking", {}).get("mode", "none")
    drawn = found if mode == "none" else stacked(found, mode == "percent")
    unit = "percentunit" if mode == "percent" else canvas.unit
    shown = found[: max(1, int(canvas.height * LEGEND_SHARE // LEGEND_LINE) - 1)]
    top, bottom = TITLE + 6, canvas.height - (len(shown) + 1) * LEGEND_LINE - 28
    marked = _axis(canvas, drawn, mode, unit)
    low, high = marked[0], marked[-1]

    def x(at: float) -> float:
        return AXIS + (at - span.start) / (span.end - span.start) * (width - AXIS - RIGHT)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    yield from times(span, x, top, bottom)
    for each in marked:
        yield line(AXIS, y(each), width - RIGHT, y(each), 'class="grid"')
        yield text(AXIS - 6, y(each) + 4, written(each, unit), "end", 'class="dim"')
    for at in canvas.marks:
        yield line(x(at), top, x(at), bottom, 'stroke="#5794f2" stroke-dasharray="3 3" opacity=".6"')
    if custom.get("thresholdsStyle", {}).get("mode", "off") != "off":
        for step in canvas.defaults["thresholds"]["steps"]:
            if step.get("value") is not None and low <= step["value"] <= high:
                look = f'stroke="{colour(step["color"])}" stroke-dasharray="8 5"'
                yield line(AXIS, y(step["value"]), width - RIGHT, y(step["value"]), look)
    fill, stepped = custom.get("fillOpacity", 0) / 100, custom.get("lineInterpolation") == "stepAfter"
    for number, each in reversed(list(enumerate(drawn))):
        paint = PALETTE[number % len(PALETTE)]
        for stretch in stretches(each.points, span.step):
            outline = [(x(at), y(value)) for at, value in corners(stretch, stepped)]
            path = " L".join(f"{at:.1f},{height:.1f}" for at, height in outline)
            floor = f"{y(max(low, 0.0)):.1f}"
            closed = f"M{outline[0][0]:.1f},{floor} L{path} L{outline[-1][0]:.1f},{floor} Z"
            yield f'<path d="{closed}" fill="{paint}" opacity="{fill}"/>'
            yield f'<path d="M{path}" fill="none" stroke="{paint}" stroke-width="1.6" stroke-linecap="round"/>'
    yield from _legend(canvas, shown, bottom + 34)


def _axis(canvas: Canvas, drawn: list[Line], mode: str, unit: str) -> list[float]:
    values = [value for each in drawn for _, value in each.points]
    lowest = min(canvas.defaults.get("min", math.inf), *values, math.inf)
    highest = max(canvas.defaults.get("max", -math.inf), *values, 1.0 if mode == "percent" else -math.inf)
    if unit == "percentunit" and 1.0 < highest < 1.1:  # rates read at different moments add up to a little more
        highest = 1.0
    return ticks(lowest, highest if highest > lowest else lowest + 1.0, base=2 if unit in BINARY else 10)


def _legend(canvas: Canvas, shown: list[Line], top: float) -> Iterator[str]:
    right, left = canvas.width - RIGHT, canvas.width - 100
    more = len(canvas.lines) - len(shown)
    yield text(10, top, f"Name ({more} more)" if more else "Name", extra='class="dim"')
    yield text(left, top, "Last", "end", 'class="dim"')
    yield text(right, top, "Max", "end", 'class="dim"')
    for number, each in enumerate(shown):
        y = top + (number + 1) * LEGEND_LINE - 1
        yield f'<rect x="10" y="{y - 7:.1f}" width="14" height="4" fill="{PALETTE[number % len(PALETTE)]}"/>'
        yield text(30, y, shortened(each.name, canvas.width - 210))
        yield text(left, y, written(each.last, canvas.unit), "end")
        yield text(right, y, written(max(value for _, value in each.points), canvas.unit), "end")
