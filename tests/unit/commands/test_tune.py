"""`xloom tune` up to the GPU it needs: tests/integration/test_gpu_tuning.py has the search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xloom.cli import main
from xloom.commands.tune import chosen_rank
from xloom.protocol import XloomError
from xloom.settings import load_settings


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "device_missing"
    assert "CUDA" in error["message"]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "example: xloom tune" in capsys.readouterr().out


def test_the_rank_is_the_option_or_the_settings_or_what_auto_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: {source: some/model}\nengine: {max_lora_rank: 128}\n")
    assert chosen_rank(load_settings(file), None) == 128
    assert chosen_rank(load_settings(file), 32) == 32
    assert chosen_rank(load_settings(None), None) == 64
    with pytest.raises(XloomError) as caught:
        chosen_rank(load_settings(None), 0)
    assert caught.value.code == "invalid_settings"
