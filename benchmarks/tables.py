"""Tables of a report, as every benchmark writes them to JSON and prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict


class Table(TypedDict):
    """One table: `rows` hold what `str` shows as it is meant to be read."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: str


def markdown(table: Table) -> str:
    """The table as GitHub's markdown, its columns padded so that it reads well in a terminal too."""
    rows = [[str(cell) for cell in row] for row in [table["columns"], *table["rows"]]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(rows[0], widths), "| " + " | ".join("-" * width for width in widths) + " |"]
    lines += [_line(row, widths) for row in rows[1:]]
    notes = f"\n\n{table['notes']}" if table["notes"] else ""
    return f"### {table['title']}\n\n" + "\n".join(lines) + notes


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths))
    ]
    return "| " + " | ".join(padded) + " |"
