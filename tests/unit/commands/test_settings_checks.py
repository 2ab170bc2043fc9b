"""What `xloom doctor` finds in settings and adapters before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xloom.cli import main
from xloom.commands.settings_checks import check_adapters, check_keys
from xloom.settings import SAMPLE, RouterSettings, parse_settings

CODE, BLEND = SAMPLE / "adapters" / "code", SAMPLE / "blend"


def found(**data: Any) -> dict[str, tuple[str, str]]:
    settings = parse_settings({"model": {"source": str(SAMPLE / "base")}, **data})
    return {finding.check: (finding.level, finding.detail) for finding in check_adapters(settings)}


def test_good_adapters_and_bundles_are_named_with_their_ranks() -> None:
    pytest.importorskip("torch")
    levels = found(
        adapters=[{"name": "code", "source": str(CODE)}, {"name": "far", "source": "org/far"}],
        xlora=[{"name": "blend", "source": str(BLEND), "top_k": 2}],
    )
    assert levels["adapter code"][0] == levels["bundle blend"][0] == "ok"
    assert "rank 36" in levels["bundle blend"][1]
    assert "not looked at" in levels["adapter far"][1]


def test_what_an_add_would_refuse_is_found(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    cut = Path(shutil.copytree(CODE, tmp_path / "cut")) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    entries = {"cut": str(cut.parent), "none": str(tmp_path / "none"), "bundle": str(BLEND)}
    levels = found(adapters=[{"name": name, "source": source} for name, source in entries.items()])
    assert {level for level, _ in levels.values()} == {"fail"}
    assert "[broken_adapter]" in levels["adapter cut"][1]
    assert "[source_not_found]" in levels["adapter none"][1]
    assert "[wrong_kind]" in levels["adapter bundle"][1]


def test_a_rank_that_the_engines_have_no_room_for_is_found() -> None:
    pytest.importorskip("torch")
    levels = found(adapters=[{"name": "code", "source": str(CODE)}], engine={"max_lora_rank": 8})
    assert "[rank_too_large]" in levels["adapter code"][1]


@pytest.mark.parametrize(
    ("router", "level"),
    [
        ({}, "ok"),
        ({"host": "localhost"}, "ok"),
        ({"host": "0.0.0.0"}, "warn"),
        ({"host": "0.0.0.0", "api_key": "a"}, "ok"),
        ({"host": "0.0.0.0", "admin_key": "b"}, "warn"),
        ({"host": "0.0.0.0", "api_key": "a", "admin_key": "b"}, "ok"),
    ],
)
def test_keys_are_held_against_the_address(router: dict[str, Any], level: str) -> None:
    (finding,) = check_keys(RouterSettings.model_validate(router))
    assert finding.level == level


def test_doctor_tells_of_settings_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("engine: {max_lora_rank: 0}\n")
    assert main(["doctor", str(file), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert "max_lora_rank" in finding["detail"]


def test_a_path_that_can_not_be_used_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--out", str(tmp_path)]) == 2
    assert "[path_unusable]" in capsys.readouterr().err
