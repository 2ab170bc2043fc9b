"""`xloom quantize`: which model and settings a command line comes to."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from xloom.commands.quantize import add_parser, chosen
from xloom.protocol import XloomError
from xloom.settings import SAMPLE


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["quantize", *options])


def test_without_anything_it_is_the_sample_at_the_defaults() -> None:
    model, isq = chosen(parsed())
    assert Path(model.source).resolve() == (SAMPLE / "base").resolve()
    assert (isq.method, isq.bits, isq.group_size, isq.calibration_samples) == ("awq", 4, 128, 128)


def test_a_settings_file_gives_both_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: {source: some/model}\nisq: {bits: 8, method: smoothquant, group_size: 64}\n")
    model, isq = chosen(parsed(str(file), "--method", "gptq", "--samples", "7"))
    assert model.source == "some/model"
    assert (isq.method, isq.bits, isq.group_size, isq.calibration_samples) == ("gptq", 8, 64, 7)


def test_a_folder_is_the_model() -> None:
    model, isq = chosen(parsed("./model", "--bits", "2", "--calibration", "mine.txt"))
    assert (model.source, isq.bits, isq.calibration) == ("./model", 2, "mine.txt")


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(XloomError) as caught:
        chosen(parsed("--group-size", "0"))
    assert caught.value.code == "invalid_settings"
