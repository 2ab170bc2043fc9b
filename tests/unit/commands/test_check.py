"""`xloom check` on a tiny model, through the transformers backend: what it prints, and how it exits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.models import tiny_adapter, tiny_bundle, tiny_model
from xloom.cli import main


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing by more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    base = tiny_model(folder / "base", "llama")
    tiny_adapter(folder / "code", base, seed=7)
    tiny_adapter(folder / "zero", base, strength=0)
    tiny_bundle(folder / "blend", base, seed=3)
    return folder


def settings_file(folder: Path, path: Path, adapters: dict[str, str], xlora: dict[str, str], **engine: Any) -> str:
    options: dict[str, Any] = {"backend": "tests.faulty:FaultyTransformers", "dtype": "float32", "max_model_len": 256}
    data = {
        "model": {"source": str(folder / "base")},
        "engine": options | {"extra_args": {"device": "cpu"}} | engine,
        "adapters": [{"name": name, "source": str(folder / source)} for name, source in adapters.items()],
        "xlora": [{"name": name, "source": str(folder / source)} for name, source in xlora.items()],
    }
    path.write_text(yaml.safe_dump(data))
    return str(path)


def findings(text: str) -> dict[tuple[str, str], str]:
    return {(each["subject"], each["proof"]): each["verdict"] for each in json.loads(text)["findings"]}


def test_what_is_served_rightly_is_proved(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = settings_file(folder, tmp_path / "s.yaml", {"code": "code"}, {"blend": "blend"})
    assert main(["check", file, "--prompts", "2", "--eager"]) == 0
    shown = capsys.readouterr().out
    assert "Proved" in shown
    for word in ("base", "code", "blend", "off the plain sum", "compiled as eager", "tokens/s"):
        assert word in shown


def test_machines_get_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = settings_file(folder, tmp_path / "s.yaml", {"code": "code"}, {"blend": "blend"})
    assert main(["check", file, "--json", "--quick", "--only", "blend"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert (report["verdict"], report["reference"], report["prompts"]) == ("proved", "float32 on cpu", 3)
    assert set(findings(out).values()) == {"ok"}
    assert {subject for subject, _ in findings(out)} == {"base", "blend"}
    assert report["speed"] == []


def test_each_fault_is_found_where_it_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = {"code": "code", "zero": "zero", "scaled-code": "code", "silent-code": "code"}
    file = settings_file(folder, tmp_path / "s.yaml", adapters, {"blend": "blend", "summed-blend": "blend"})
    assert main(["check", file, "--json", "--quick"]) == 1
    out = capsys.readouterr().out
    wrong = {key for key, verdict in findings(out).items() if verdict != "ok"}
    assert wrong == {
        ("zero", "effect"),
        ("scaled-code", "reference"),
        ("silent-code", "reference"),
        ("silent-code", "effect"),
        ("summed-blend", "reference"),
        ("summed-blend", "gates"),
    }
    details = {each["subject"]: each["detail"] for each in json.loads(out)["findings"] if each["proof"] == "reference"}
    assert "the plain sum of its adapters" in details["summed-blend"]
    assert "the base model" in details["silent-code"]


def test_a_fault_is_shown_with_its_cure(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = settings_file(folder, tmp_path / "s.yaml", {"zero": "zero"}, {})
    assert main(["check", file, "--quick", "--prompts", "1"]) == 1
    shown = capsys.readouterr().out
    assert "Its files change nothing" in shown
    assert "Train it" in shown
    assert "Failed" in shown


def test_a_base_without_a_reference_is_not_called_right(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xloom.verification.loading.available_memory", lambda: 1000)
    file = settings_file(folder, tmp_path / "s.yaml", {"code": "code"}, {})
    assert main(["check", file, "--quick", "--prompts", "1"]) == 1
    shown = capsys.readouterr().out
    assert "not compared" in shown
    assert "Incomplete" in shown


def test_a_name_that_is_not_there_is_a_usage_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = settings_file(folder, tmp_path / "s.yaml", {"code": "code"}, {})
    assert main(["check", file, "--only", "cod"]) == 2
    assert "model_not_found" in capsys.readouterr().err
