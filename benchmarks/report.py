"""docs/benchmarks.md from the JSON files of the benchmarks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from string import Template

from .machine import machine_line
from .tables import markdown

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("report.md")


def report(files: list[Path]) -> str:
    """The page: the template's text, then each benchmark's command, machine and tables."""
    sections = []
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        name = result["name"]
        head = f"## {name}\n\n`python -m benchmarks.{name}`\n\nRan on: {machine_line(result['machine'])}."
        sections.append("\n\n".join([head, *(markdown(table) for table in result["tables"])]))
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(results="\n\n".join(sections)).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        epilog="example: python -m benchmarks.report build/benchmarks/engine.json build/benchmarks/http.json",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="results, in the order of the page")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md", help="(%(default)s)")
    options = parser.parse_args()
    options.out.write_text(report(options.files), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
