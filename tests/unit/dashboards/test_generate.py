"""The files that are made from the code are current, and one command makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xloom_dashboards import generate
from xloom_dashboards.boards import BOARDS


def test_the_files_are_current() -> None:
    """After a change: python -m xloom_dashboards.generate."""
    assert generate.stale() == []


def test_one_command_writes_what_is_missing_stale_or_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--check"], tmp_path) == 1
    assert "dashboards/alerts.yaml is stale" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert generate.main([], tmp_path) == 0
    assert generate.main(["--check"], tmp_path) == 0
    (tmp_path / "dashboards" / "xloom-store.json").write_text("{}", encoding="utf-8")
    (tmp_path / "dashboards" / "old.json").write_text("{}", encoding="utf-8")
    assert generate.stale(tmp_path) == [Path("dashboards/old.json"), Path("dashboards/xloom-store.json")]
    assert generate.main([], tmp_path) == 0
    assert generate.stale(tmp_path) == []


def test_the_chart_has_the_same_boards_and_they_fit_a_config_map() -> None:
    files = generate.files()
    for board in BOARDS:
        assert files[Path("dashboards", board.file)] == files[Path("helm/xloom/files/dashboards", board.file)]
        assert json.loads(files[Path("dashboards", board.file)]) == board.json()
    assert sum(len(generate.text_of(board).encode()) for board in BOARDS) < 2**20
