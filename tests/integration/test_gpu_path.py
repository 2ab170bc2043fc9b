"""The GPU path as far as a machine without one allows: vLLM's Triton wrapper and our shrink, on a fake device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROUNDING = 5e-3  # of float16 in, float32 between


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each check of the program found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.triton_interpreter"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result["check"]: result["found"] for result in results}


@pytest.mark.parametrize("blocks", ["default", "split_k 1", "split_k 4", "wide blocks"])
def test_bundles_adapters_and_base_rows_in_one_batch_equal_plain_torch(found: dict[str, Any], blocks: str) -> None:
    assert found[f"mixed, {blocks}"] < ROUNDING


def test_gates_made_of_a_linears_input_equal_plain_torch_when_captured_too(found: dict[str, Any]) -> None:
    assert len(found["of inputs"]) == 6
    assert max(found["of inputs"]) < ROUNDING


def test_a_captured_step_is_right_for_other_rows_gates_and_bundles_than_it_was_captured_with(
    found: dict[str, Any],
) -> None:
    assert len(found["replayed"]) == 6
    assert max(found["replayed"]) < ROUNDING


def test_the_replay_would_show_a_frozen_address(found: dict[str, Any]) -> None:
    assert found["stale capture"] > 100 * ROUNDING


def test_a_step_without_adapters_launches_no_kernel(found: dict[str, Any]) -> None:
    assert found["base rows"] == []


def test_the_gate_costs_no_kernel_of_its_own(found: dict[str, Any]) -> None:
    assert found["kernels"] == 2 * ["gated_shrink_kernel", "_lora_expand_kernel"]


def test_plain_adapters_get_what_vllms_own_wrapper_gives(found: dict[str, Any]) -> None:
    assert found["plain is vLLM's"] is True


def test_a_row_whose_gates_were_never_set_is_not_answered_with_the_plain_sum(found: dict[str, Any]) -> None:
    assert found["without gates"] is True


def test_a_slot_is_described_anew_when_its_adapter_changes_under_one_id(found: dict[str, Any]) -> None:
    assert max(found["same id anew"]) < ROUNDING


def test_batch_invariance_holds_for_gated_rows(found: dict[str, Any]) -> None:
    assert found["invariant"] is True


def test_gates_of_another_shape_or_device_are_refused(found: dict[str, Any]) -> None:
    shape, count, device = found["wrong gates"]
    assert "(2, 3, 3)" in shape
    assert "(1, 3, 2)" in count
    assert "on cpu, not" in device


def test_the_fake_device_finds_what_a_gpu_refuses_or_waits_for(found: dict[str, Any]) -> None:
    two = "on tensors of two devices"
    waits = "the host waits for the device"
    ends = [two, two, two, "from memory that is not pinned", waits, waits, "was handed a tensor of the host"]
    assert [text.endswith(end) for text, end in zip(found["strict"], ends, strict=True)] == [True] * len(ends)


def test_triton_in_the_environment_does_not_change_what_vllm_on_cpu_runs() -> None:
    code = "from vllm.triton_utils import HAS_TRITON; print('usable', HAS_TRITON)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "usable False" in done.stdout
