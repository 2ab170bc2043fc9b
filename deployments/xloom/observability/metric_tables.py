"""The metrics as docs/monitoring.md lists them, from the table.

`python -m xloom.observability.metric_tables docs/monitoring.md` writes them anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from xloom.observability.table import METRICS, Metric

BEGIN, END = "<!-- metrics -->", "<!-- end of metrics -->"
WRITERS = {
    "router": "The router: one request each",
    "replica": "The replica: one engine each, and X-LoRA in it",
    "store": "The adapter store",
    "autoscaling": "Autoscaling: Serve's controller",
}


def metric_tables() -> str:
    """All metrics as markdown: a table for each part of xloom that writes them, in the table's own order."""
    writers = dict.fromkeys(metric.component for metric in METRICS)
    return "\n\n".join("\n".join(_table(writer)) for writer in writers)


def _table(component: str) -> Iterator[str]:
    yield f"**{WRITERS[component]}**"
    yield ""
    yield "| metric | kind | labels | what |"
    yield "|---|---|---|---|"
    for metric in METRICS:
        if metric.component == component:
            yield f"| `{metric.exported}` | {metric.kind} | {_labels(metric)} | {_text(metric)} |"


def _labels(metric: Metric) -> str:
    return ", ".join(f"`{label}`" for label in metric.labels)


def _text(metric: Metric) -> str:
    """What it is, and what must happen before it is there."""
    return f"{metric.text}; once {metric.on_event}" if metric.on_event else metric.text


def with_metric_tables(page: str) -> str:
    """The page with the tables between its marks as the code has them now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{metric_tables()}\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_metric_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
