"""The search of `xloom tune`, as far as a machine without a GPU allows: interpreted kernels and a clock of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xloom.vllm.engine.lora_configs import fault, lora_shapes, tuned_folder

pytest.importorskip("triton")
# As in tuning_interpreter.py.
MODEL = SimpleNamespace(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
SHAPES = lora_shapes(MODEL, 16)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.tuning_interpreter", str(tmp_path_factory.mktemp("tuned"))],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_fastest_configuration_that_computes_the_right_thing_is_kept(result: dict[str, Any]) -> None:
    kinds = {(each["operator"], each["slices"], each["k"]) for each in result["found"]}
    assert len(kinds) == len(SHAPES.shrink) + len(SHAPES.expand)
    assert {each["config"]["block_m"] for each in result["found"]} == {32}  # 16 is faster and wrong
    assert all(each["us"] < each["default_us"] for each in result["found"])


def test_what_is_written_is_complete_and_found_by_the_engine(result: dict[str, Any]) -> None:
    folder = Path(result["folder"])
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["Some_GPU_1_EXPAND_TRUE.json", "Some_GPU_1_SHRINK.json"]
    for name, operator in zip(names, ("expand", "shrink"), strict=True):
        assert fault(json.loads((folder / name).read_text(encoding="utf-8")), operator, SHAPES) is None
    assert tuned_folder("Some GPU-1", SHAPES, (folder.parent,), {}) == folder


def test_a_search_that_ran_out_of_time_has_every_default(result: dict[str, Any]) -> None:
    assert len(result["hurried"]) == len(result["found"])
    assert all(each["us"] == each["default_us"] for each in result["hurried"])


def test_a_kernel_that_is_wrong_by_default_is_refused(result: dict[str, Any]) -> None:
    assert result["refused"] == "kernel_wrong"
