"""Mixtures under all that vLLM schedules: random requests on both model runners, each answer held against PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUNS: dict[str, list[str]] = {
    "v1": ["--seed", "4", "--long-prefill", "8", "--requests", "50"],
    "v1-asynchronous-priority": ["--asynchronous", "--policy", "priority", "--seqs", "4", "--blocks", "10"],
    "v1-adapters-in-the-scaling-pass": ["--scaling-pass-value", "0.3", "--max-loras", "1", "--seed", "3",
                                        "--requests", "40"],
    "v2": ["--runner", "v2", "--requests", "30", "--blocks", "11"],
    "v2-asynchronous": ["--runner", "v2", "--requests", "30", "--asynchronous", "--blocks", "11", "--seed", "2"],
    "v2-gpu-kernels": ["--runner", "v2", "--wrapper", "gpu", "--dtype", "float16", "--requests", "6", "--plain",
                       "--blocks", "60", "--budget", "128"],
}  # fmt: skip


def played(options: list[str]) -> dict[str, Any]:
    """What `paired_requests` reports; a process of its own, as runner and kernels are chosen at import."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.paired_requests", *options],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


@pytest.mark.parametrize("run", RUNS)
def test_every_answer_is_pefts_and_nothing_is_left(run: str) -> None:
    if "v2" in run:
        pytest.importorskip("triton")
    report = played(RUNS[run])
    assert report["runner"] == f"vllm.v1.worker.gpu{'.' if 'v2' in run else '_'}model_runner"
    assert report["scheduler"] == ("Async" if "asynchronous" in run else "") + "MixtureScheduler"
    assert report["wrong"] == []
    assert report["gates_off"] == []
    assert report["unfinished"] == []
    assert report["overfull"] == 0  # never more requests at once than max_num_seqs
    assert set(report["left"].values()) == {0}
    assert report["finished"] > 5
    if "gpu" not in run:  # pages are few: pairs were preempted
        assert report["pair_preemptions"] > 0
        assert report["aborted"] > 0
