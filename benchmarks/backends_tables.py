"""The tables of the backends benchmark: what was measured of each backend, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from .install_size import sizes
from .processes import MIB
from .tables import Table

NOTHING = "–"


@dataclass
class Figures:
    """What was measured of one backend."""

    name: str
    xlora: bool = False
    load_seconds: float = 0.0
    peak: int = 0  # bytes
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens a second, by load
    firsts: dict[str, list[float]] = field(default_factory=dict)  # median milliseconds to the first token, by load
    failed: dict[str, str] = field(default_factory=dict)  # load -> why

    def rate(self, key: str) -> float | None:
        """The median over the rounds."""
        return statistics.median(self.rates[key]) if key in self.rates else None

    def first(self, key: str) -> float | None:
        """The median over the rounds."""
        return statistics.median(self.firsts[key]) if key in self.firsts else None


def speed(title: str, kind: str, figures: Sequence[Figures], concurrent: Sequence[int], notes: str) -> Table:
    """One kind of request: tokens a second and the time to the first token, by backend and number of sessions."""
    names = [each.name for each in figures]
    rows = []
    for count in concurrent:
        key = f"{kind}/{count}"
        rates = [each.rate(key) for each in figures]
        ratios = [None if rate is None or rates[0] is None else rates[0] / rate for rate in rates[1:]]
        row = [str(count), *(_shown(rate, ",.0f") for rate in rates), *(_shown(ratio, ".2f") for ratio in ratios)]
        rows.append([*row, *(_shown(each.first(key), ",.0f") for each in figures)])
    return {
        "title": title,
        "columns": [
            "sessions",
            *(f"{name}, tokens/s" for name in names),
            *(f"{names[0]} ÷ {name}" for name in names[1:]),
            *(f"{name}, first token (ms)" for name in names),
        ],
        "rows": rows,
        "notes": notes,
    }


def memory_table(figures: Sequence[Figures]) -> Table:
    """Peak memory and the time to load."""
    return {
        "title": "Memory and start",
        "columns": ["backend", "peak memory (MiB)", "seconds to load"],
        "rows": [[each.name, f"{each.peak / MIB:,.0f}", f"{each.load_seconds:.2f}"] for each in figures],
        "notes": "Peak resident memory after all loads, summed over the backend's processes (pages they share count in "
        "each), the measuring itself included. vLLM sets its KV pages aside at the start: 4096 pages of 16 tokens.",
    }


def install_table() -> Table:
    """What each backend takes on disk."""
    return {
        "title": "Install size",
        "columns": ["", "distributions", "MiB"],
        "rows": [[name, count, f"{size / MIB:,.0f}"] for name, (count, size) in sizes().items()],
        "notes": "Of the core alone, and of each backend with the core and all that it requires, installed for CPU.",
    }


def _shown(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
