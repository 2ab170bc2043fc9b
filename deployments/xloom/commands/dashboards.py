"""`xloom dashboards`: the Grafana boards and the alerts, listed, written to files, or published."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.protocol import XloomError

if TYPE_CHECKING:
    from xloom_dashboards.publish import Change, Plan

DEFAULT_URL = "http://127.0.0.1:3000"
TOKEN_VARIABLE = "XLOOM_GRAFANA_TOKEN"
DIFFERS = 1  # exit code: a board was refused, or a dry run found one that differs
_SHOWN = 20  # lines of a board's difference; --json has all


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = _command(commands, "dashboards", "Grafana boards and alerts.", "xloom dashboards list")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = _command(actions, "list", "List the boards.", "xloom dashboards list --json")
    listing.add_argument("--json", action="store_true", help="print JSON, for machines")
    listing.set_defaults(run=lambda arguments, console: list_boards(console, as_json=arguments.json))

    text = "Write the boards as JSON, and the alerts as Prometheus rules, to a folder."
    exporting = _command(actions, "export", text, "xloom dashboards export ./grafana")
    exporting.add_argument("folder", type=Path, metavar="FOLDER")
    exporting.add_argument("--json", action="store_true", help="print JSON, for machines")
    exporting.set_defaults(
        run=lambda arguments, console: export_boards(console, arguments.folder, as_json=arguments.json)
    )

    text = (
        "Create the boards in a Grafana, or bring them up to date. Shows what differs first. Exits with 1 when a board "
        "is refused, or a dry run finds one that differs."
    )
    publishing = _command(
        actions, "publish", text, "xloom dashboards publish --url https://grafana.example.com --token-file token"
    )
    publishing.add_argument("--url", default=DEFAULT_URL, help=f"Grafana (default: {DEFAULT_URL})")
    secret = publishing.add_mutually_exclusive_group()
    secret.add_argument("--token-file", type=Path, metavar="FILE", help="file with a service account's token")
    secret.add_argument("--token", help=f"the token itself (default: {TOKEN_VARIABLE})")
    publishing.add_argument("--folder", default="xloom", help="made where it is missing (default: xloom)")
    publishing.add_argument("--datasource", metavar="NAME", help="Prometheus the boards open with (default: the first)")
    publishing.add_argument("--dry-run", action="store_true", help="show what differs and change nothing")
    publishing.add_argument("--overwrite", action="store_true", help="also boards that somebody changed in Grafana")
    publishing.add_argument("--yes", action="store_true", help="do not ask")
    publishing.add_argument("--json", action="store_true", help="print JSON, for machines; does not ask")
    publishing.set_defaults(run=publish_boards)


def _command(commands: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    return parser


def list_boards(console: Console, *, as_json: bool) -> int:
    """Print the boards."""
    from xloom_dashboards.boards import BOARDS

    if as_json:
        found = [{"uid": board.uid, "title": board.title, "panels": len(list(board.panels()))} for board in BOARDS]
        console.print_json(data=found)
        return 0
    table = Table("board", "uid", "panels", "shows")
    for board in BOARDS:
        table.add_row(board.title, board.uid, str(len(list(board.panels()))), board.text)
    console.print(table)
    return 0


def export_boards(console: Console, folder: Path, *, as_json: bool) -> int:
    """Write the boards and the rules to a folder. Raises `XloomError`."""
    from xloom_dashboards.boards import BOARDS
    from xloom_dashboards.generate import text_of
    from xloom_dashboards.rules import plain_rules

    files = {board.file: text_of(board) for board in BOARDS} | {"alerts.yaml": plain_rules()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise XloomError("cannot_write", f"{folder} can't be written: {error}.", "Name another folder.") from None
    if as_json:
        console.print_json(data=[str(folder / name) for name in files])
    else:
        console.print(f"Wrote {len(files)} files to {escape(str(folder))}.", highlight=False)
    return 0


def publish_boards(arguments: argparse.Namespace, console: Console) -> int:
    """Bring a Grafana up to date, as the command line says. Raises `XloomError`."""
    token = _token(arguments.token, arguments.token_file)
    try:
        from xloom_dashboards import publish
        from xloom_dashboards.grafana import Grafana
    except ModuleNotFoundError as error:
        raise XloomError(
            "missing_package",
            f"Publishing needs the package {error.name!r}, which is not installed.",
            "pip install 'xloom[dashboards]'",
        ) from None
    with Grafana(arguments.url, token) as grafana:
        plan = publish.plan(grafana, arguments.folder, arguments.datasource, overwrite=arguments.overwrite)
        if not arguments.json:
            _show_plan(console, grafana.url, plan)
        changes = plan.changes
        if not arguments.dry_run:
            if plan.due and not arguments.yes and not arguments.json and not _agreed(console):
                console.print("Nothing was changed.")
                return DIFFERS
            changes = tuple(publish.apply(grafana, plan, overwrite=arguments.overwrite))
            if not arguments.json:
                _show_outcome(console, changes)
    if arguments.json:
        console.print_json(data=_as_data(plan, changes, dry_run=arguments.dry_run))
    refused = any(change.action == "refused" for change in changes)
    return DIFFERS if refused or (arguments.dry_run and plan.due) else 0


def _token(given: str | None, file: Path | None) -> str:
    """The token, from wherever it is. Raises `XloomError`."""
    if file is not None:
        try:
            return file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            name = type(error).__name__  # a decoding error would show what it read
            raise XloomError(
                "invalid_grafana_token", f"{file} can't be read ({name}).", "Give a file with nothing but the token."
            ) from None
    token = given or os.environ.get(TOKEN_VARIABLE, "")
    if not token.strip():
        raise XloomError(
            "invalid_grafana_token",
            "There is no token for Grafana.",
            "Make a service account with the role Editor (Administration, Users and access), and give its token with "
            f"--token-file or {TOKEN_VARIABLE}.",
        )
    return token.strip()


def _agreed(console: Console) -> bool:
    """What a person at a terminal says; without one nobody is asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    return console.input("Publish? [y/N] ", markup=False).strip().lower() in ("y", "yes")


def _show_plan(console: Console, url: str, plan: Plan) -> None:
    version = f" {plan.grafana}" if plan.grafana else ""
    made = ", which is to be made" if plan.folder_uid is None else ""
    _say(console, f"Grafana{version} at {url}, folder {plan.folder}{made}")
    for note in plan.notes:
        _say(console, note)
    for change in plan.changes:
        _say(console, f"{change.title}: {change.action}{f', {change.reason}' if change.reason else ''}")
        for line in change.lines[:_SHOWN]:
            _say(console, f"  {line}")
        if len(change.lines) > _SHOWN:
            _say(console, f"  and {len(change.lines) - _SHOWN} more")
        if change.cure:
            _say(console, f"  {change.cure}")


def _show_outcome(console: Console, changes: tuple[Change, ...]) -> None:
    words = {"create": "created", "update": "updated"}
    for change in changes:
        if change.action in words:
            _say(console, f"{words[change.action]} {change.url}")
        elif change.action == "refused" and change.body is not None:
            _say(console, f"{change.title}: refused, {change.reason}. {change.cure}")
    if all(change.action == "unchanged" for change in changes):
        _say(console, "Nothing to do.")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)


def _as_data(plan: Plan, changes: tuple[Change, ...], *, dry_run: bool) -> dict[str, Any]:
    return {
        "grafana": plan.grafana,
        "folder": plan.folder,
        "datasource": plan.source or None,
        "dry_run": dry_run,
        "notes": list(plan.notes),
        "boards": [
            {
                "uid": change.uid,
                "title": change.title,
                "action": change.action,
                "differences": list(change.lines),
                "reason": change.reason or None,
                "url": change.url or None,
            }
            for change in changes
        ],
    }
