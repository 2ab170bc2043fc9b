"""Our Triton kernels, and vLLM's beside it, compiled for GPUs that this machine does not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.triton_compiler", str(capability)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("compiled ")]
    ours = {"gated_shrink_kernel", "input_gates_kernel"}
    assert {name for _, name, *_ in lines} == ours | {"_lora_shrink_kernel", "_lora_expand_kernel"}
    assert all(int(size) > 0 for *_, size in lines)
