"""Write the boards and the rules as files, here and in the chart: `python -m xloom_dashboards.generate [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xloom_dashboards.board import Board
from xloom_dashboards.boards import BOARDS
from xloom_dashboards.rules import REGENERATE, chart_alerts, plain_rules

ROOT = Path(__file__).parents[2]  # of the checkout


def text_of(board: Board) -> str:
    """A board's file."""
    return json.dumps(board.json(), indent=2, ensure_ascii=False) + "\n"


def files() -> dict[Path, str]:
    """What each file should hold, by its path in the checkout."""
    found = {Path("dashboards/alerts.yaml"): plain_rules(), Path("helm/xloom/files/alerts.yaml"): chart_alerts()}
    for board in BOARDS:
        for folder in ("dashboards", "helm/xloom/files/dashboards"):
            found[Path(folder, board.file)] = text_of(board)
    return found


def stale(root: Path = ROOT) -> list[Path]:
    """Files that are not what they should be, or should not be there."""
    wanted = files()
    folders = {path.parent for path in wanted if path.suffix == ".json"}
    extra = [path.relative_to(root) for folder in folders for path in (root / folder).glob("*.json")]
    wrong = [path for path, text in wanted.items() if _read(root / path) != text]
    return sorted([*wrong, *(path for path in extra if path not in wanted)])


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write what is stale; with --check only say so, and fail."""
    parser = argparse.ArgumentParser(prog=REGENERATE, description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a file is stale")
    check = parser.parse_args(arguments).check
    wanted = files()
    changed = stale(root)
    for path in changed:
        if check:
            print(f"{path} is stale: run {REGENERATE}", file=sys.stderr)
        elif path in wanted:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(wanted[path], encoding="utf-8")
        else:
            (root / path).unlink()
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
