"""`xloom check` on real vLLM: a deployment that serves rightly is proved, and each fault is found where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from xloom.cli import main

from ..models import tiny_adapter, tiny_bundle, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters with and without effect, and a mixture."""
    folder = tmp_path_factory.mktemp("check")
    base = tiny_model(folder / "base", "llama")
    tiny_adapter(folder / "code", base, seed=7)
    tiny_adapter(folder / "zero", base, strength=0)
    tiny_bundle(folder / "blend", base, seed=3)
    return folder


def check(folder: Path, path: Path, capfd: pytest.CaptureFixture[str], *options: str, **names: str) -> tuple[int, Any]:
    """Run it on vLLM, faulty by the adapters' names; its exit status and report. `names`: name -> source."""
    kinds = {name: "xlora" if source == "blend" else "adapters" for name, source in names.items()}
    data: dict[str, Any] = {
        "model": {"source": str(folder / "base")},
        "engine": {
            "backend": "tests.faulty:FaultyVLLM",
            "dtype": "float32",
            "max_model_len": 256,
            "compile": "--eager" in options,
            "paged_attention": {"max_blocks": 512},
        },
    }
    for kind in ("adapters", "xlora"):
        data[kind] = [
            {"name": name.replace("_", "-"), "source": str(folder / source)}
            for name, source in names.items()
            if kinds[name] == kind
        ]
    path.write_text(yaml.safe_dump(data))
    status = main(["check", str(path), "--json", *options])
    return status, json.loads(capfd.readouterr().out)


def test_what_is_served_rightly_is_proved(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = {"code": "code", "blend": "blend"}
    status, report = check(folder, tmp_path / "settings.yaml", capfd, "--eager", "--prompts", "2", **names)
    assert (status, report["verdict"]) == (0, "proved")
    proofs = {(finding["subject"], finding["proof"]) for finding in report["findings"]}
    assert proofs == {
        *(("base", proof) for proof in ("reference", "unchanged", "batch", "eager")),
        *(("code", proof) for proof in ("reference", "effect", "batch", "eager")),
        *(("blend", proof) for proof in ("reference", "effect", "gates", "batch", "eager")),
    }
    assert [case["case"] for case in report["speed"]] == ["base", "code", "blend", "base beside one of blend"]


def test_each_fault_is_found_where_it_is(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapters = {"code": "code", "zero": "zero", "scaled_code": "code", "silent_code": "code"}
    mixtures = {"blend": "blend", "summed_blend": "blend"}
    status, report = check(
        folder, tmp_path / "settings.yaml", capfd, "--quick", "--prompts", "2", **adapters, **mixtures
    )
    assert (status, report["verdict"]) == (1, "failed")
    wrong = {(each["subject"], each["proof"]) for each in report["findings"] if each["verdict"] != "ok"}
    assert wrong == {
        ("zero", "effect"),
        ("scaled-code", "reference"),
        ("silent-code", "reference"),
        ("silent-code", "effect"),
        ("summed-blend", "reference"),
        ("summed-blend", "gates"),
    }
    details = {each["subject"]: each["detail"] for each in report["findings"] if each["proof"] == "reference"}
    assert "the plain sum of its adapters" in details["summed-blend"]
