from __future__ import annotations

import json
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.report import report
from benchmarks.tables import Table, markdown

TABLE: Table = {
    "title": "Speed",
    "columns": ["n", "tokens/s"],
    "rows": [[1, "430"], [64, "7,600"]],
    "notes": "Medians.",
}


def test_a_table_is_markdown_with_its_notes() -> None:
    lines = markdown(TABLE).splitlines()
    assert lines[0] == "### Speed"
    assert lines[2:6] == ["| n  | tokens/s |", "| -- | -------- |", "| 1  |      430 |", "| 64 |    7,600 |"]
    assert lines[-1] == "Medians."


def test_the_page_holds_each_result_with_its_command_and_machine(tmp_path: Path) -> None:
    files = []
    for name in ("engine", "http"):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"name": name, "machine": machine(), "tables": [TABLE]}), encoding="utf-8")
    page = report(files)
    assert "$" not in page
    assert page.index("python -m benchmarks.engine") < page.index("python -m benchmarks.http")
    assert page.count("### Speed") == 2
    assert f"{machine()['cores']} cores" in page
