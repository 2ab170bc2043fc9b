"""The metrics as docs/monitoring.md lists them, from the table.

`python -m xloom.observability.reference docs/monitoring.md` writes them anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from xloom.observability.table import METRICS, Metric

BEGIN, END = "<!-- metrics -->", "<!-- end of metrics -->"
ROOMS = {
    "router": "The router: one request each",
    "replica": "The replica: one engine each, and X-LoRA in it",
    "store": "The adapter store",
    "autoscaling": "Autoscaling: Serve's controller",
}


def reference() -> str:
    """All metrics as markdown: a table for each room, in the table's own order."""
    rooms = dict.fromkeys(metric.room for metric in METRICS)
    return "\n\n".join("\n".join(_room(room)) for room in rooms)


def _room(room: str) -> Iterator[str]:
    yield f"**{ROOMS[room]}**"
    yield ""
    yield "| metric | kind | labels | what |"
    yield "|---|---|---|---|"
    for metric in METRICS:
        if metric.room == room:
            yield f"| `{metric.exported}` | {metric.kind} | {_labels(metric)} | {_text(metric)} |"


def _labels(metric: Metric) -> str:
    return ", ".join(f"`{label}`" for label in metric.labels)


def _text(metric: Metric) -> str:
    """What it is, and what must happen before it is there."""
    return f"{metric.text}; once {metric.on_event}" if metric.on_event else metric.text


def with_reference(page: str) -> str:
    """The page with the tables between its marks as the code has them now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_reference(file.read_text(encoding="utf-8")), encoding="utf-8")
