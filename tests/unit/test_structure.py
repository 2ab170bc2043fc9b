"""docs/structure.md has one line for each module, and names nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "structure.md"
LINE = re.compile(r"^- `([^`]+)`: \S")
FOLDERS = ("deployments/xloom", "dashboards", "benchmarks", "requirements", "tests")


def modules() -> set[str]:
    """Python files by their path; empty package markers have nothing to say."""
    return {
        str(file.relative_to(ROOT))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if not (file.name == "__init__.py" and len(file.read_text(encoding="utf-8").splitlines()) <= 1)
    }


def lines() -> list[str]:
    """What the document describes, a folder ending in a slash."""
    return [match[1] for line in DOC.read_text(encoding="utf-8").splitlines() if (match := LINE.match(line))]


def covered(module: str, described: set[str]) -> bool:
    """A module has its own line; a test may be under its folder's."""
    if module in described:
        return True
    return module.startswith("tests/") and any(f"{parent}/" in described for parent in Path(module).parents)


def test_every_module_has_a_line() -> None:
    described = set(lines())
    assert sorted(module for module in modules() if not covered(module, described)) == []


@pytest.mark.parametrize("path", lines())
def test_every_line_names_what_is_there(path: str) -> None:
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


def test_no_line_is_there_twice() -> None:
    assert len(lines()) == len(set(lines()))
