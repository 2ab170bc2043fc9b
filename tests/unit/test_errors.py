"""Every error code the product can raise is documented with its cure, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("deployments/xloom", "dashboards/xloom_dashboards")
RAISERS = {"XloomError": 0, "RequestFailed": 1, "Refusal": 0}  # name -> position of the code among its arguments


def sources() -> list[str]:
    return [path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def codes_in_source() -> set[str]:
    """String constants that stand where a code goes, conditional expressions included."""
    codes: set[str] = set()
    for source in sources():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            position = RAISERS.get(name)
            if position is None or len(node.args) <= position:
                continue
            for part in ast.walk(node.args[position]):
                if (
                    isinstance(part, ast.Constant)
                    and isinstance(part.value, str)
                    and re.fullmatch(r"[a-z_]+", part.value)
                ):
                    codes.add(part.value)
    return codes


def codes_in_docs() -> set[str]:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-z_]+)` \|", text, flags=re.MULTILINE))


def test_every_code_is_documented() -> None:
    assert codes_in_source() - codes_in_docs() == set()


def test_no_documented_code_is_gone() -> None:
    written = "".join(sources())
    gone = {code for code in codes_in_docs() if f'"{code}"' not in written}
    assert gone == set()
