"""What can be quantised, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.models import tiny_model
from xloom.protocol import XloomError
from xloom.quantization import overlay
from xloom.quantization.source import plain_model
from xloom.settings import ModelSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.bfloat16)


def refused(folder: Path) -> str:
    with pytest.raises(XloomError) as caught:
        plain_model(ModelSettings(source=str(folder)))
    assert caught.value.cure
    return caught.value.code


def test_decoder_linears_are_told_from_the_rest(model: Path) -> None:
    found = plain_model(ModelSettings(source=str(model)))
    assert found.dtype == "bfloat16"
    assert found.ignored == ("lm_head",)
    assert len(found.linears) == 14
    assert found.weights.linears == sum(rows * columns for rows, columns in found.linears.values())
    assert found.weights.others > 0
    assert found.weights.dtype_bytes == 2


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    assert refused(tiny_model(tmp_path, "mixtral")) == "isq_unsupported_model"


def test_a_quantised_model_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert refused(folder) == "already_quantised"


def test_pickled_weights_are_refused(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert refused(tmp_path) == "pickle_refused"


def test_a_missing_model_is_an_error_with_a_cure(tmp_path: Path) -> None:
    assert refused(tmp_path) == "model_not_loadable"
    assert refused(tmp_path / "not-there") == "model_not_loadable"


def test_without_llmcompressor_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(XloomError) as caught:
        overlay.overlay()
    assert caught.value.code == "isq_missing"
    assert "make install" in caught.value.cure


def test_the_overlay_comes_first_on_the_childs_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / overlay.FOLDER
    (folder / "llmcompressor").mkdir(parents=True)
    (folder / "llmcompressor-0.14.dist-info").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/other")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = overlay.environment()
    assert environment["PYTHONPATH"] == f"{folder}:/other"
    assert "OMP_NUM_THREADS" not in environment
    assert overlay.versions() == "llmcompressor-0.14"
