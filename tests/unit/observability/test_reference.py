"""docs/monitoring.md lists the metrics of the table, and has a runbook for each alert."""

from __future__ import annotations

import re
from pathlib import Path

from xloom.observability.reference import BEGIN, END, ROOMS, reference, with_reference
from xloom.observability.table import METRICS

PAGE = Path(__file__).parents[3] / "docs" / "monitoring.md"


def test_the_page_shows_what_the_table_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_reference(page) == page, "run: python -m xloom.observability.reference docs/monitoring.md"


def test_every_metric_is_listed_once_in_its_room() -> None:
    parts = dict(zip(ROOMS, reference().split("**")[2::2], strict=True))
    for metric in METRICS:
        assert [room for room, part in parts.items() if f"`{metric.exported}`" in part] == [metric.room]


def test_labels_and_events_are_said() -> None:
    lines = {line.split("`")[1]: line for line in reference().splitlines() if line.startswith("| `")}
    for metric in METRICS:
        line = lines[metric.exported]
        assert all(f"`{label}`" in line for label in metric.labels)
        assert metric.on_event in line


def test_the_tables_take_the_place_of_the_old_ones() -> None:
    page = with_reference(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n{reference()}\n{END}\nafter\n"
    assert with_reference(page) == page


def test_every_picture_and_page_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target
