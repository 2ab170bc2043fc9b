"""The GPU path as far as a machine without one allows: the real Triton kernels and our gate, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_gated_triton_kernels_equal_plain_torch() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.triton_interpreter"],
        cwd=root,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("largest error ")
    assert float(last.removeprefix("largest error ")) < 5e-3  # float16 in, float32 between
