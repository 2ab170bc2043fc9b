"""`xloom dashboards publish`, against a server that keeps Grafana's contract."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.dashboards.grafana_server import GrafanaServer, grafana_server
from xloom.commands import dashboards
from xloom.protocol import XloomError
from xloom_dashboards.boards import BOARDS

grafana = pytest.importorskip("xloom_dashboards.grafana", reason="grafana-api is not installed")
MARK = pytest.importorskip("xloom_dashboards.publish").MARK


UIDS = [board.uid for board in BOARDS]
ADMIN, EDITOR, VIEWER = "glsa_admin", "glsa_editor", "glsa_viewer"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrafanaServer]:
    monkeypatch.delenv(dashboards.TOKEN_VARIABLE, raising=False)
    with grafana_server(GrafanaServer()) as state:
        yield state


def run(*words: str) -> tuple[int, str]:
    """The command's exit code, and what it printed."""
    parser = argparse.ArgumentParser()
    dashboards.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["dashboards", *words])
    console = Console(width=200, record=True, file=sys.stdout)
    code: int = arguments.run(arguments, console)
    return code, console.export_text()


def publish(server: GrafanaServer, *words: str, token: str = ADMIN) -> tuple[int, dict[str, Any]]:
    """The command's exit code, and what it printed as JSON."""
    code, text = run("publish", "--url", server.url, "--token", token, "--json", *words)
    return code, json.loads(text)


def actions(answer: dict[str, Any]) -> dict[str, str]:
    return {board["uid"]: board["action"] for board in answer["boards"]}


def test_the_first_run_makes_the_folder_and_the_boards(server: GrafanaServer) -> None:
    code, answer = publish(server)
    assert code == 0
    assert actions(answer) == dict.fromkeys(UIDS, "create")
    assert answer["boards"][0]["url"] == f"{server.url}/d/{UIDS[0]}/slug"
    assert server.writes == ["folder xloom", *(f"board {uid}" for uid in UIDS)]
    for board in BOARDS:
        stored = server.boards[board.uid]
        assert {key: value for key, value in stored.board.items() if key not in ("id", "version")} == board.json()
        assert server.folders[stored.folder] == "xloom"
        assert stored.history[-1]["message"].startswith(MARK)


def test_the_second_run_changes_nothing(server: GrafanaServer) -> None:
    publish(server)
    server.writes.clear()
    code, answer = publish(server)
    assert code == 0
    assert actions(answer) == dict.fromkeys(UIDS, "unchanged")
    assert server.writes == []


def test_a_grafana_that_stores_boards_in_its_own_way_is_up_to_date_too(server: GrafanaServer) -> None:
    server.adds = {"preload": False}
    publish(server)
    assert actions(publish(server)[1]) == dict.fromkeys(UIDS, "unchanged")


def test_only_the_board_that_differs_is_updated(server: GrafanaServer) -> None:
    publish(server)
    old = "every panel of an older version"
    server.edit("xloom-store", author="xloom", message=f"{MARK} 0123456789abcdef", description=old)
    server.writes.clear()
    code, answer = publish(server)
    assert code == 0
    assert actions(answer) == dict.fromkeys(UIDS, "unchanged") | {"xloom-store": "update"}
    assert server.writes == ["board xloom-store"]
    [line] = next(board["differences"] for board in answer["boards"] if board["uid"] == "xloom-store")
    assert line.startswith(f'~ description: "{old}" -> ')
    assert server.boards["xloom-store"].board["version"] == 3
    assert actions(publish(server)[1]) == dict.fromkeys(UIDS, "unchanged")


def test_a_dry_run_shows_what_would_be_done_and_writes_nothing(server: GrafanaServer) -> None:
    code, answer = publish(server, "--dry-run")
    assert code == dashboards.DIFFERS
    assert answer["dry_run"] is True
    assert actions(answer) == dict.fromkeys(UIDS, "create")
    assert server.writes == []
    assert {method for method, _ in server.seen} == {"GET"}
    publish(server)
    assert publish(server, "--dry-run")[0] == 0


@pytest.mark.parametrize("pages", [True, False], ids=["history in pages", "history as a list"])
def test_a_board_somebody_edited_is_left_alone_until_told_otherwise(server: GrafanaServer, pages: bool) -> None:
    server.pages = pages
    publish(server)
    server.edit("xloom-serving", author="ada", message="my panel", refresh="5s")
    server.writes.clear()
    code, answer = publish(server)
    assert code == dashboards.DIFFERS
    assert actions(answer)["xloom-serving"] == "refused"
    assert "by ada" in answer["boards"][0]["reason"]
    assert answer["boards"][0]["differences"] == ['~ refresh: "5s" -> "30s"']
    assert server.writes == []
    code, answer = publish(server, "--overwrite")
    assert code == 0
    assert server.boards["xloom-serving"].board["refresh"] == "30s"


def test_a_board_saved_by_somebody_between_look_and_save_is_refused(server: GrafanaServer) -> None:
    publish(server)
    ours = f"{MARK} 0123456789abcdef"
    server.edit("xloom-serving", author="xloom", message=ours, description="old")
    server.before_save = lambda: server.edit("xloom-serving", author="ada", refresh="5s")
    code, answer = publish(server)
    assert code == dashboards.DIFFERS
    assert actions(answer)["xloom-serving"] == "refused"
    assert "while it was being published" in answer["boards"][0]["reason"]
    assert server.boards["xloom-serving"].board["refresh"] == "5s"


def test_a_title_that_is_taken_is_refused_and_the_others_are_published(server: GrafanaServer) -> None:
    publish(server, "--folder", "xloom")
    theirs = server.boards.pop("xloom-cluster")
    theirs.board["uid"] = "somebody-elses"
    server.boards["somebody-elses"] = theirs
    server.boards.pop("xloom-store")
    code, answer = publish(server)
    assert code == dashboards.DIFFERS
    assert actions(answer) == {
        "xloom-serving": "unchanged",
        "xloom-cluster": "refused",
        "xloom-xlora": "unchanged",
        "xloom-store": "create",
    }
    assert "xloom-store" in server.boards


def test_a_provisioned_board_is_refused_with_its_place(server: GrafanaServer) -> None:
    publish(server)
    stored = server.boards["xloom-xlora"]
    stored.provisioned, stored.board["refresh"] = True, "5s"
    stored.history[-1]["message"] = ""
    code, answer = publish(server, "--overwrite")
    assert code == dashboards.DIFFERS
    [refused] = [board for board in answer["boards"] if board["action"] == "refused"]
    assert "provisioning" in refused["reason"]


def test_a_board_in_another_folder_is_moved(server: GrafanaServer) -> None:
    publish(server, "--folder", "old place")
    code, answer = publish(server)
    assert code == 0
    assert actions(answer) == dict.fromkeys(UIDS, "update")
    assert {server.folders[stored.folder] for stored in server.boards.values()} == {"xloom"}


def test_boards_can_go_to_the_top(server: GrafanaServer) -> None:
    assert publish(server, "--folder", "General")[0] == 0
    assert server.folders == {}
    assert {stored.folder for stored in server.boards.values()} == {""}


def test_the_boards_open_with_the_data_source_that_is_named(server: GrafanaServer) -> None:
    code, answer = publish(server, "--datasource", "Metrics")
    assert (code, answer["datasource"]) == (0, "Metrics")
    for stored in server.boards.values():
        first = stored.board["templating"]["list"][0]
        assert first["current"] == {"selected": True, "text": "Metrics", "value": "prom-uid"}


def test_an_editor_who_may_not_see_data_sources_can_publish(server: GrafanaServer) -> None:
    code, answer = publish(server, token=EDITOR)
    assert code == 0
    assert "was not checked" in answer["notes"][0]
    assert set(server.boards) == set(UIDS)


def refused(*words: str) -> XloomError:
    with pytest.raises(XloomError) as caught:
        run("publish", "--json", *words)
    return caught.value


def test_a_wrong_token_is_refused_and_never_shown(server: GrafanaServer, capfd: pytest.CaptureFixture[str]) -> None:
    error = refused("--url", server.url, "--token", "glsa_wrong")
    assert error.code == "grafana_unauthorized"
    assert "--token-file" in error.cure
    assert "glsa_wrong" not in str(error) + "".join(capfd.readouterr())
    assert server.writes == []


def test_a_viewer_is_refused(server: GrafanaServer) -> None:
    error = refused("--url", server.url, "--token", VIEWER)
    assert error.code == "grafana_forbidden"
    assert "Editor" in error.cure


@pytest.mark.parametrize("token", ["glsa secret", "glsa\nsecret", "glsä_secret", " "])
def test_what_can_be_no_token_is_refused_without_showing_it(server: GrafanaServer, token: str) -> None:
    error = refused("--url", server.url, "--token", token)
    assert error.code == "invalid_grafana_token"
    assert "secret" not in str(error)
    assert server.seen == []


def test_the_token_comes_from_a_file_or_the_environment(
    server: GrafanaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{ADMIN}\n", encoding="utf-8")
    assert run("publish", "--url", server.url, "--json", "--token-file", str(file))[0] == 0
    assert refused("--url", server.url).code == "invalid_grafana_token"
    assert refused("--url", server.url, "--token-file", str(tmp_path / "none")).code == "invalid_grafana_token"
    monkeypatch.setenv(dashboards.TOKEN_VARIABLE, ADMIN)
    assert run("publish", "--url", server.url, "--json")[0] == 0


def test_without_a_prometheus_nothing_is_published(server: GrafanaServer) -> None:
    server.data_sources = [{"id": 1, "uid": "loki-uid", "name": "Logs", "type": "loki"}]
    error = refused("--url", server.url, "--token", ADMIN)
    assert error.code == "grafana_no_prometheus"
    server.data_sources = []
    assert refused("--url", server.url, "--token", ADMIN).code == "grafana_no_prometheus"
    assert server.writes == []


def test_a_data_source_that_is_not_there_is_refused_with_those_that_are(server: GrafanaServer) -> None:
    error = refused("--url", server.url, "--token", ADMIN, "--datasource", "Logs")
    assert error.code == "grafana_no_data_source"
    assert "Metrics" in error.cure


def test_a_server_that_is_no_grafana_is_refused(server: GrafanaServer) -> None:
    assert refused("--url", f"{server.url}/other", "--token", ADMIN).code == "not_a_grafana"


def test_nobody_there_is_said_at_once(server: GrafanaServer) -> None:
    assert refused("--url", "http://127.0.0.1:9", "--token", ADMIN).code == "grafana_unreachable"
    assert refused("--url", "ftp://127.0.0.1", "--token", ADMIN).code == "invalid_url"
    error = refused("--url", "http://ada:secret@127.0.0.1:9", "--token", ADMIN)
    assert error.code == "invalid_url"
    assert "secret" not in str(error)


def test_people_are_shown_what_differs_and_what_was_done(server: GrafanaServer) -> None:
    words = ("publish", "--url", server.url, "--token", ADMIN, "--yes")
    code, text = run(*words)
    assert code == 0
    assert f"Grafana 12.1.0 at {server.url}, folder xloom, which is to be made" in text
    assert f"created {server.url}/d/xloom-serving/slug" in text
    assert ADMIN not in text
    server.edit("xloom-serving", refresh="5s")
    code, text = run(*words)
    assert code == dashboards.DIFFERS
    assert '~ refresh: "5s" -> "30s"' in text
    assert "give --overwrite" in text
    assert f"updated {server.url}/d/xloom-serving/slug" in run(*words, "--overwrite")[1]
    assert "Nothing to do." in run(*words)[1]


@pytest.mark.parametrize(("said", "written"), [("n", False), ("", False), ("yes", True)])
def test_a_person_at_a_terminal_is_asked(
    server: GrafanaServer, monkeypatch: pytest.MonkeyPatch, said: str, written: bool
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(Console, "input", lambda self, prompt, markup: said)
    code, _ = run("publish", "--url", server.url, "--token", ADMIN)
    assert (code, bool(server.writes)) == (0 if written else dashboards.DIFFERS, written)


def test_the_extra_is_named_when_it_is_missing(server: GrafanaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xloom_dashboards.grafana", None)
    error = refused("--url", server.url, "--token", ADMIN)
    assert error.code == "missing_package"
    assert "xloom[dashboards]" in error.cure


def test_the_boards_are_listed_and_exported(tmp_path: Path) -> None:
    code, text = run("list", "--json")
    assert code == 0
    assert [board["uid"] for board in json.loads(text)] == UIDS
    assert "xloom / Serving" in run("list")[1]
    code, _ = run("export", str(tmp_path / "new" / "folder"))
    assert code == 0
    written = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert written == {*(f"{uid}.json" for uid in UIDS), "alerts.yaml"}
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with pytest.raises(XloomError) as caught:
        run("export", str(file))
    assert caught.value.code == "cannot_write"


def test_the_seams_of_grafana_api_are_those_relied_on(server: GrafanaServer) -> None:
    """Its session, which is told not to follow redirects; and refusals with their status and body."""
    with grafana.Grafana(server.url, VIEWER) as calls:
        assert calls.check() == server.version
        assert calls._face.api.s.max_redirects == 0
        with pytest.raises(grafana.GrafanaException) as caught:
            calls._face.dashboard.get_dashboard("none")
    assert (caught.value.status_code, caught.value.response) == (404, {"message": "Dashboard not found"})


def test_a_grafana_below_a_path_is_reached_there(server: GrafanaServer) -> None:
    server.prefix = "/grafana"
    server.url += server.prefix
    code, answer = publish(server)
    assert code == 0
    assert answer["boards"][0]["url"] == f"{server.url}/d/{UIDS[0]}/slug"


def test_a_url_that_is_sent_on_is_refused_with_where_to(server: GrafanaServer) -> None:
    server.moved = "https://grafana.example.com/"
    error = refused("--url", server.url, "--token", ADMIN)
    assert error.code == "not_a_grafana"
    assert server.moved in error.message
