"""Publishing: what must change in a Grafana so that it has the boards, and doing that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from xloom.protocol import XloomError
from xloom_dashboards.board import Board
from xloom_dashboards.boards import BOARDS
from xloom_dashboards.difference import differences, stripped
from xloom_dashboards.grafana import Conflict, DataSource, Grafana, Published

MARK = "xloom dashboards publish"  # begins the message of each version that is ours; then the board's digest

Action = Literal["create", "update", "unchanged", "refused"]


@dataclass(frozen=True)
class Change:
    """What is to be done about one board, or was."""

    uid: str
    title: str
    action: Action
    lines: tuple[str, ...] = ()  # what differs
    reason: str = ""  # why it is refused
    cure: str = ""
    url: str = ""
    body: dict[str, Any] | None = None  # what would be sent


@dataclass(frozen=True)
class Plan:
    """What must change in one Grafana."""

    grafana: str  # its version
    folder: str  # its title
    folder_uid: str | None  # None: it must be made
    source: str  # the data source the boards open with; empty: Grafana's first
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    @property
    def due(self) -> bool:
        """Whether anything would be written."""
        return any(change.action in ("create", "update") for change in self.changes)

    @property
    def refused(self) -> bool:
        """Whether a board is refused."""
        return any(change.action == "refused" for change in self.changes)


def plan(
    grafana: Grafana,
    folder: str,
    source: str | None = None,
    *,
    overwrite: bool = False,
    boards: Sequence[Board] = BOARDS,
) -> Plan:
    """Look, and change nothing. Raises `XloomError`: no such Grafana, token, or data source."""
    version = grafana.check()
    folder_uid = grafana.folder(folder)  # also the first call that needs the token
    chosen, notes = choose(grafana.data_sources(), source)
    changes = tuple(_change(grafana, board, folder_uid, chosen, overwrite) for board in boards)
    return Plan(version, folder, folder_uid, chosen.name if chosen else "", changes, notes)


def choose(sources: list[DataSource] | None, name: str | None) -> tuple[DataSource | None, tuple[str, ...]]:
    """The data source that was named, after looking whether there is any. Raises `XloomError`."""
    if sources is None:
        note = "The token may not look at data sources: whether there is a Prometheus was not checked."
        return (DataSource(name, name) if name else None), (note,)
    if not sources:
        raise XloomError(
            "grafana_no_prometheus",
            "Grafana has no Prometheus data source.",
            "Add one (Connections, Data sources) that scrapes Ray's exporter: docs/monitoring.md says how.",
            404,
        )
    if name is None:
        return None, ()
    for each in sources:
        if name in (each.name, each.uid):
            return each, ()
    raise XloomError(
        "grafana_no_data_source",
        f"Grafana has no Prometheus data source {name!r}.",
        f"Name one of these: {', '.join(each.name for each in sources)}.",
        404,
    )


def apply(grafana: Grafana, plan: Plan, *, overwrite: bool = False) -> Iterator[Change]:
    """Do what is planned, board by board. A board that is refused does not keep the others back."""
    folder_uid = plan.folder_uid
    if folder_uid is None and plan.due:
        folder_uid = grafana.make_folder(plan.folder)
    for change in plan.changes:
        if change.body is None or folder_uid is None:
            yield change
            continue
        try:
            url = grafana.save(change.body, folder_uid, _message(change.body), overwrite=overwrite)
        except Conflict as conflict:
            cure = "Run it again to see what differs; --overwrite puts this board in its place."
            yield replace(change, action="refused", reason=str(conflict), cure=cure)
        else:
            yield replace(change, url=url)


def board_json(board: Board, source: DataSource | None) -> dict[str, Any]:
    """What is published: the board, opening with a data source where one was named."""
    found = board.json()
    if source is not None:
        current = {"selected": True, "text": source.name, "value": source.uid}
        variables = found["templating"]["list"]
        found["templating"]["list"] = [
            each | {"current": current} if each["type"] == "datasource" else each for each in variables
        ]
    return found


def digest(board: dict[str, Any]) -> str:
    """Of a board's content, without what is the server's."""
    text = json.dumps(stripped(board), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _message(board: dict[str, Any]) -> str:
    return f"{MARK} {digest(board)}"


def _change(
    grafana: Grafana, board: Board, folder_uid: str | None, source: DataSource | None, overwrite: bool
) -> Change:
    wanted = board_json(board, source)
    there = grafana.board(board.uid)
    if there is None:
        return Change(board.uid, board.title, "create", body=wanted)
    moved = there.folder != folder_uid
    # Grafana may store a board in its own way: the digest in the newest version's message says what was sent.
    same = stripped(there.board) == wanted or there.message == _message(wanted)
    if same and not moved:
        return Change(board.uid, board.title, "unchanged")
    lines = tuple(["~ folder"] if moved else []) + (() if same else tuple(differences(there.board, wanted)))
    refused = _why_not(there, same, overwrite)
    if refused:
        return Change(board.uid, board.title, "refused", lines, *refused)
    return Change(board.uid, board.title, "update", lines, body=wanted | {"version": there.version})


def _why_not(there: Published, same: bool, overwrite: bool) -> tuple[str, str] | None:
    """Why a board that differs is left as it is, and what to do."""
    if there.provisioned:
        return (
            "it comes from Grafana's provisioning, which alone can change it",
            "Change it there (the chart's dashboards ConfigMap), or take it out there and publish again.",
        )
    if overwrite or same or there.message is None or there.message.startswith(MARK):
        return None
    who = f" by {there.author}" if there.author else ""
    return (
        f"it was changed in Grafana{who}, not by this command",
        "Save the changes under another title in Grafana, then give --overwrite.",
    )
