"""`xloom compose`: what a command line comes to, from the text files to the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import tiny_adapter, tiny_bundle, tiny_model
from xloom.cli import FAILED, main
from xloom.mixtures.linear_router import load_linear_router


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, two adapters for it, one for another model, and a text for each."""
    folder = tmp_path_factory.mktemp("compose")
    base = tiny_model(folder / "base", "llama")
    tiny_adapter(folder / "code", base, rank=4, targets=("q_proj", "v_proj"), seed=1)
    tiny_adapter(folder / "docs", base, rank=2, targets=("q_proj", "v_proj"), seed=2)
    tiny_adapter(folder / "alien", tiny_model(folder / "other", "llama", num_layers=4), targets=("q_proj",))
    tiny_bundle(folder / "bundle", base)
    (folder / "code.jsonl").write_text("\n".join(json.dumps({"text": f"x = {n}\n" * 20}) for n in range(64)))
    (folder / "docs.txt").write_text("\n\n".join(f"Some words, and page {n}. " * 6 for n in range(64)))
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 500)
    return folder


@pytest.fixture(autouse=True)
def _there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)


BOTH = ["--adapters", "code=./code", "docs=docs", "--text", "code=code.jsonl", "docs=docs.txt"]
STEPS, QUICK = ["--steps", "3"], ["--batch", "2", "--length", "32", "--held-out-rows", "1", "--device", "cpu"]


def test_adapters_and_text_become_a_router_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "blend"
    assert main(["compose", "./base", *BOTH, *STEPS, *QUICK, "--out", str(out)]) == 0
    told = capsys.readouterr()
    for row in ("base", "adapter code", "adapter docs", "uniform weights", "Arrow, top", "the new router"):
        assert row in told.out
    assert "Training: " in told.err
    assert list(load_linear_router(out).adapters) == ["code", "docs"]
    assert main(["compose", "./base", *BOTH, *STEPS, *QUICK, "--out", str(out)]) == FAILED
    assert "folder_not_empty" in capsys.readouterr().err


def test_a_bundle_is_learned_from_and_json_says_how_alike_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compose", "./base", "--distil", "./bundle", "--mixed", "docs.txt", "--tune", "1", "--json"]
    assert main([*command, *QUICK, "--out", str(tmp_path / "cheap")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["perplexity"]["bundle"]) == {"mixed"}
    assert 0 <= record["agreement"]["tokens"] <= 1
    assert record["options"]["tune"] == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--adapters", "code=./code", "--text", "code=code.jsonl"], "invalid_composition"),
        (["--adapters", "code=./code", "docs=./docs", "--text", "code=code.jsonl"], "missing_text"),
        ([*BOTH, "sums=code.jsonl"], "invalid_composition"),
        ([*BOTH, "--distil", "./bundle"], "invalid_composition"),
        ([*BOTH, "--tune", "3"], "invalid_composition"),
        (["--distil", "./bundle", "--mixed", "docs.txt", "--steps", "3"], "invalid_composition"),
        ([*BOTH, "--learning-rate", "-1"], "invalid_composition"),
        (["--adapters", "code", "docs=./docs"], "invalid_composition"),
        (["--distil", "./bundle"], "missing_text"),
        (["--distil", "./bundle", "--routing", "xlora", "--mixed", "docs.txt"], "invalid_composition"),
        (["--distil", "./code", "--mixed", "docs.txt"], "broken_bundle"),
        (["--adapters", "code=./code", "x=./alien", "--text", "code=code.jsonl", "x=docs.txt"], "wrong_base"),
        (["--adapters", "code=./code", "x=./nowhere", "--text", "code=code.jsonl", "x=docs.txt"], "source_not_found"),
        (["--adapters", "code=./code", "docs=./docs", "--text", "code=code.jsonl", "docs=empty.txt"], "no_calibration"),
        (["--adapters", "code=./code", "docs=./docs", "--text", "code=code.jsonl", "docs=latin.txt"], "no_calibration"),
        (["--adapters", "code=./code", "docs=./docs", "--text", "code=code.jsonl", "docs=no.txt"], "no_calibration"),
        ([*BOTH, "--length", "4096"], "invalid_composition"),
        ([*BOTH, "--device", "gpu"], "device_missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cant_work_is_told_with_its_code(
    options: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [each for each in QUICK if not ({"--length", "--device"} & set(options) and each in ("--length", "32"))]
    assert main(["compose", "./base", *quick, *options, "--json", "--out", str(tmp_path / "out")]) == FAILED
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code
    assert error["cure"]
    assert not (tmp_path / "out").exists()
    assert "xloom-" not in error["message"]  # the copy that was fetched
    assert "isq" not in error["message"]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compose", "--help"])
    assert "example: xloom compose" in capsys.readouterr().out
