"""`bits: auto` takes the most bits that fit, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from xloom.quantization.fitting import GIB, PROCESS_BYTES, Weights, available_memory, choose_bits, free_bytes

SEVEN_BILLION = Weights(linears=6_500_000_000, others=500_000_000)


@pytest.mark.parametrize(
    ("budget_gib", "bits"),
    [(20, None), (12, 8), (6, 4)],
)
def test_the_most_bits_that_fit_are_taken(budget_gib: float, bits: int | None) -> None:
    free = int(budget_gib * GIB) + PROCESS_BYTES
    choice = choose_bits("awq", "cpu", SEVEN_BILLION, free=free, reserved=0)
    assert choice.bits == bits
    assert "fits" in choice.reason


def test_kv_pages_are_kept_free() -> None:
    free = 20 * GIB + PROCESS_BYTES
    assert choose_bits("awq", "cpu", SEVEN_BILLION, free=free, reserved=8 * GIB).bits == 8


def test_two_bits_are_passed_over_since_they_save_nothing() -> None:
    choice = choose_bits("gptq", "cpu", SEVEN_BILLION, free=GIB, reserved=0)
    assert choice.bits == 4
    assert "2 bits: " in choice.reason
    assert "no less than with more bits" in choice.reason
    assert "nothing fits" in choice.reason


def test_a_case_the_method_has_not_is_passed_over() -> None:
    choice = choose_bits("smoothquant", "cuda", SEVEN_BILLION, free=GIB, reserved=0)
    assert choice.bits == 8
    assert "4 bits: not with smoothquant on cuda" in choice.reason


def test_free_memory_is_read_within_the_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert available_memory(meminfo, tmp_path / "no group") == 2048 * 1024
    assert available_memory(tmp_path / "none", tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")  # page cache, which can be dropped
    assert available_memory(meminfo, tmp_path) == 600
    (tmp_path / "memory.current").write_text("9000\n")
    assert available_memory(meminfo, tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(meminfo, tmp_path) == 2048 * 1024


def test_this_machine_has_memory() -> None:
    assert free_bytes("cpu") > 0
