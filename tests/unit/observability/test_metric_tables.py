"""docs/monitoring.md lists the metrics of the table, and has a runbook for each alert."""

from __future__ import annotations

import re
from pathlib import Path

from xloom.observability.metric_tables import BEGIN, END, WRITERS, metric_tables, with_metric_tables
from xloom.observability.table import METRICS

PAGE = Path(__file__).parents[3] / "docs" / "monitoring.md"


def test_the_page_shows_what_the_table_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_metric_tables(page) == page, "run: python -m xloom.observability.metric_tables docs/monitoring.md"


def test_every_metric_is_listed_once_by_who_writes_it() -> None:
    parts = dict(zip(WRITERS, metric_tables().split("**")[2::2], strict=True))
    for metric in METRICS:
        assert [writer for writer, part in parts.items() if f"`{metric.exported}`" in part] == [metric.component]


def test_labels_and_events_are_said() -> None:
    lines = {line.split("`")[1]: line for line in metric_tables().splitlines() if line.startswith("| `")}
    for metric in METRICS:
        line = lines[metric.exported]
        assert all(f"`{label}`" in line for label in metric.labels)
        assert metric.on_event in line


def test_the_tables_take_the_place_of_the_old_ones() -> None:
    page = with_metric_tables(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n{metric_tables()}\n{END}\nafter\n"
    assert with_metric_tables(page) == page


def test_every_picture_and_page_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target
