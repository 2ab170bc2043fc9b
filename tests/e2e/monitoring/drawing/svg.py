"""The pieces of SVG that all panels are made of, in Grafana's dark colours."""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Callable, Iterator

from .series import Canvas, Span

PALETTE = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")
NAMED = {
    "green": "#73bf69", "yellow": "#fade2a", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2",
    "purple": "#b877d9", "text": "#ccccdc", "transparent": "none", "gray": "#8e8e99",
}  # fmt: skip
TITLE = 30  # pixels from a panel's top to its drawing
CLOCK = (15, 30, 60, 120, 300, 600, 1800, 3600)  # seconds between two times of an axis
TIME_WIDTH = 64  # pixels that a time takes on an axis


def colour(name: str) -> str:
    """Grafana's names, shades included, as the browser knows them."""
    return name if name.startswith("#") else NAMED.get(re.sub(r"^(super-light|light|semi-dark|dark)-", "", name), name)


def threshold_colour(canvas: Canvas, value: float) -> str:
    """The colour of the highest threshold that a value reaches."""
    reached = "green"
    for step in canvas.defaults.get("thresholds", {}).get("steps", []):
        if step.get("value") is None or value >= step["value"]:
            reached = step["color"]
    return colour(reached)


def text(x: float, y: float, words: str, anchor: str = "start", extra: str = "") -> str:
    """A line of text; `extra` are attributes."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    """A straight line; `look` are attributes."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {look}/>'


def times(span: Span, x: Callable[[float], float], top: float, bottom: float) -> Iterator[str]:
    """The axis of time, with a line upwards at each."""
    most = max(2.0, (x(span.end) - x(span.start)) / TIME_WIDTH)
    wide = next((each for each in CLOCK if (span.end - span.start) / each <= most), 7200)
    at = math.ceil(span.start / wide) * wide
    form = "%H:%M" if wide >= 60 else "%H:%M:%S"
    while at <= span.end:
        yield line(x(at), top, x(at), bottom, 'class="grid"')
        yield text(x(at), bottom + 14, time.strftime(form, time.gmtime(at)), "middle", 'class="dim"')
        at += wide


def shortened(words: str, pixels: float) -> str:
    """As much of a text as fits, at the size of a legend."""
    room = max(2, int(pixels / 6.4))
    return words if len(words) <= room else f"{words[: room - 1]}…"
