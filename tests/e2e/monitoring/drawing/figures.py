"""Panels of newest values: large numbers, bars and tables; and histograms over time."""

from __future__ import annotations

from collections.abc import Iterator

from .graph import AXIS, RIGHT
from .series import Canvas, Point
from .svg import TITLE, colour, line, shortened, text, threshold_colour, times
from .units import written

SCHEMES = {"Oranges": (255, 152, 48), "Blues": (87, 148, 242), "Greens": (115, 191, 105)}
MOST_LABELS = 9  # of a heatmap's buckets
TABLE_ROW = 24  # pixels
EXPONENT = 0.5  # of a heatmap's colours


def stat(canvas: Canvas) -> Iterator[str]:
    """The newest value of each series, large, before its course."""
    share = canvas.width / len(canvas.lines)
    for number, each in enumerate(canvas.lines):
        words, paint = _value(canvas, each.last)
        left, middle = number * share, (number + 0.5) * share
        yield from _spark(each.points, canvas, left, share, paint)
        size = min(38.0, canvas.height * 0.36, share / max(4, len(words)) * 1.5)
        look = f'style="font-size:{size:.0f}px;font-weight:bold;fill:{paint}"'
        yield text(middle, canvas.height * 0.55 + size * 0.3, words, "middle", look)
        if len(canvas.lines) > 1:
            yield text(middle, TITLE + 12, shortened(each.name, share), "middle", 'class="dim"')


def _value(canvas: Canvas, value: float) -> tuple[str, str]:
    """As the panel's mappings have it, else with its unit and the colour of its threshold."""
    for mapping in canvas.defaults.get("mappings", []):
        for key, shown in mapping.get("options", {}).items():
            if mapping["type"] == "value" and float(key) == value:
                return shown["text"], colour(shown["color"])
    return written(value, canvas.unit), threshold_colour(canvas, value)


def _spark(points: list[Point], canvas: Canvas, left: float, width: float, paint: str) -> Iterator[str]:
    if canvas.panel.get("options", {}).get("graphMode", "none") != "area" or len(points) < 2:
        return
    span, tall = canvas.span, canvas.height * 0.3
    values = [value for _, value in points]
    low, high = min(0.0, *values), max(values)

    def place(point: Point) -> str:
        x = left + (point[0] - span.start) / (span.end - span.start) * width
        return f"{x:.1f},{canvas.height - 3 - (point[1] - low) / ((high - low) or 1.0) * tall:.1f}"

    path = " L".join(map(place, points))
    first, final = place(points[0]).partition(",")[0], place(points[-1]).partition(",")[0]
    closed = f"M{first},{canvas.height - 1:.1f} L{path} L{final},{canvas.height - 1:.1f} Z"
    yield f'<path d="{closed}" fill="{paint}" opacity=".18"/><path d="M{path}" fill="none" stroke="{paint}"/>'


def bars(canvas: Canvas) -> Iterator[str]:
    """The newest value of each series, side by side."""
    room = canvas.height - TITLE - 8
    tall = min(44.0, room / len(canvas.lines))
    shown = canvas.lines[: max(1, int(room // 18))]
    tall = max(tall, 18.0)
    highest = canvas.defaults.get("max") or max(each.last for each in canvas.lines) or 1.0
    names = min(canvas.width * 0.38, 7.0 * max(len(each.name) for each in canvas.lines) + 16)
    longest = canvas.width - names - 90
    for number, each in enumerate(shown):
        y = TITLE + 4 + number * tall
        words, paint = _value(canvas, each.last)
        yield text(10, y + tall / 2 + 4, shortened(each.name, names - 10))
        yield _box(names, y + 2, longest, tall - 6, "#22252b")
        yield _box(names, y + 2, max(2.0, min(1.0, each.last / highest) * longest), tall - 6, paint)
        yield text(canvas.width - 10, y + tall / 2 + 4, words, "end", f'style="fill:{paint};font-weight:bold"')


def _box(x: float, y: float, width: float, height: float, paint: str, opacity: float = 1.0) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{paint}" opacity="{opacity:g}"/>'


def heatmap(canvas: Canvas) -> Iterator[str]:
    """How many fell into each bucket at each time: Prometheus' buckets hold all below them too."""
    span = canvas.span
    found = sorted((float(each.labels["le"]), dict(each.points)) for each in canvas.lines if "le" in each.labels)
    below: dict[float, float] = {}
    cells = []
    for _, points in found:
        cells.append({at: max(0.0, value - below.get(at, 0.0)) for at, value in points.items()})
        below = points
    top, bottom = TITLE + 6, canvas.height - 26
    tall = (bottom - top) / len(found)
    most = max((value for row in cells for value in row.values()), default=0.0) or 1.0

    def x(at: float) -> float:
        return AXIS + (at - span.start) / (span.end - span.start) * (canvas.width - AXIS - RIGHT)

    yield from times(span, x, top, bottom)
    red, green, blue = SCHEMES[canvas.panel["options"]["color"].get("scheme", "Oranges")]
    every = -(-len(found) // MOST_LABELS)
    for number, ((bound, _), row) in enumerate(zip(found, cells, strict=True)):
        y = bottom - (number + 1) * tall
        if number % every == 0 and bound != float("inf"):
            yield text(AXIS - 6, y + 4, written(bound, canvas.unit), "end", 'class="dim"')
        for at, value in row.items():
            if value > 1e-9:
                paint, wide = f"rgb({red},{green},{blue})", x(span.start + span.step) - AXIS
                yield _box(x(at) - wide, y + 1, max(1.0, wide - 0.6), tall - 1.5, paint, (value / most) ** EXPONENT)


def table(canvas: Canvas) -> Iterator[str]:
    """The newest value of each series as a row, its labels as columns."""
    labels = list(dict.fromkeys(name for each in canvas.lines for name in each.labels if name != "__name__"))
    renamed = {"Value": "Value"}
    for transformation in canvas.panel.get("transformations", []):
        renamed |= transformation.get("options", {}).get("renameByName", {})
    heads = [*(renamed.get(name, name) for name in labels), renamed["Value"]]
    wide = (canvas.width - 20) / len(heads)
    for number, head in enumerate(heads):
        look = 'style="fill:#6e9fff;font-weight:bold"'
        yield text(10 + number * wide, TITLE + 16, shortened(head, wide), extra=look)
    rows = sorted(canvas.lines, key=lambda each: -each.last)[: int((canvas.height - TITLE - 24) // TABLE_ROW)]
    for row, each in enumerate(rows):
        y = TITLE + 16 + (row + 1) * TABLE_ROW
        yield line(8, y - 16, canvas.width - 8, y - 16, 'class="grid"')
        for number, name in enumerate(labels):
            yield text(10 + number * wide, y, shortened(each.labels.get(name, ""), wide))
        yield text(10 + len(labels) * wide, y, _value(canvas, each.last)[0])
