"""Quantising refuses before it has loaded a model, and says what the worker says."""

from __future__ import annotations

from pathlib import Path

import pytest

from xloom.protocol import XloomError
from xloom.quantization import overlay
from xloom.quantization.quantise import _job, plan, quantised_folder
from xloom.quantization.source import plain_model
from xloom.settings import SAMPLE, IsqSettings, ModelSettings


@pytest.fixture(autouse=True)
def _llmcompressor() -> None:
    try:
        overlay.overlay()
    except XloomError as error:
        pytest.skip(error.message)


def test_layers_that_a_method_does_not_know_are_refused(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=1,
        ffn_dim=64,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    isq = IsqSettings(method="awq", cache=str(tmp_path / "cache"))
    wanted = plan(plain_model(ModelSettings(source=str(tmp_path / "model"))), isq, "cpu")
    stages: list[str] = []
    with pytest.raises(XloomError) as caught:
        quantised_folder(wanted, isq, "cpu", lambda stage, done, total: stages.append(stage))
    assert caught.value.code == "isq_unsupported_model"
    assert "OPTForCausalLM" in caught.value.message
    assert stages == []


def test_the_worker_finds_the_files_that_were_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one\n\ntwo\n")
    isq = IsqSettings(calibration="./text.txt", cache="./cache")
    job = _job(plan(plain_model(ModelSettings(source=str(SAMPLE / "base"))), isq, "cpu"), isq, "cpu", Path("out"))
    assert job.calibration == str(tmp_path / "text.txt")
    assert job.out == str(tmp_path / "out")
