from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.client import Load, Run
from benchmarks.http_tables import tables
from benchmarks.metrics import ENGINE, FIRST_TOKEN, means
from benchmarks.processes import Memory
from benchmarks.servers import vllm_flags
from benchmarks.side_by_side import Sample, Side, SideBySide

RUN = Run(throughput=100.0, ttft=10.0, ttft_mean=12.0, tpot=1.0, itl_p99=2.0, output_tokens=1000, seconds=10.0)
FIRST = {FIRST_TOKEN: 9.0, ENGINE[0]: 1.0, ENGINE[1]: 5.0}


def side(name: str, throughputs: list[float], ttft: float) -> Side:
    samples = [
        Sample(replace(RUN, throughput=each, ttft=ttft), {"worker": 0.5, "client": 0.1}, FIRST, 0.02)
        for each in throughputs
    ]
    return Side(name, {1: samples}, {"worker": 0.01}, {"worker": Memory(1, 2**30, 2**29)})


@pytest.fixture
def both() -> SideBySide:
    return SideBySide(side("vllm", [100, 200, 400], 10), side("xloom", [90, 100, 380], 13))


def test_the_ratio_is_of_the_medians_over_the_rounds(both: SideBySide) -> None:
    assert both.ratio(1) == 0.5
    assert both.ratios(1) == [0.9, 0.5, 0.95]


def test_the_added_time_is_the_difference_of_the_medians(both: SideBySide) -> None:
    assert both.added_first_token(1) == pytest.approx(3.0)


def test_processor_time_is_per_output_token(both: SideBySide) -> None:
    assert both.rival.cpu_per_token(1) == pytest.approx({"worker": 500.0, "client": 100.0})


def test_a_run_beside_a_busy_process_is_marked(both: SideBySide) -> None:
    loads = [Load(1, 8, 128, 128)]
    assert not both.disturbed(1)
    assert "disturbed" not in str(tables([both], loads, 3, [])[0]["rows"])
    both.baseline.samples[1][0] = replace(both.baseline.samples[1][0], other_cores=1.5)
    assert both.disturbed(1)
    assert "1.50 (disturbed)" in str(tables([both], loads, 3, [])[0]["rows"])


def test_every_row_of_every_table_fills_its_columns(both: SideBySide) -> None:
    made = tables([both], [Load(1, 8, 128, 128)], 3, [])
    assert len(made) == 5
    for table in made:
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}


def test_means_are_of_the_new_observations_alone() -> None:
    assert means({FIRST_TOKEN: (1.0, 10.0)}, {FIRST_TOKEN: (1.5, 20.0), ENGINE[0]: (0.0, 0.0)}) == {FIRST_TOKEN: 50.0}


def test_engine_arguments_become_flags() -> None:
    arguments = {
        "model": "m",
        "enforce_eager": False,
        "enable_lora": True,
        "block_size": 32,
        "lora_target_modules": ["a", "b"],
    }
    assert vllm_flags(arguments) == [
        "--model",
        "m",
        "--enable-lora",
        "--block-size",
        "32",
        "--lora-target-modules",
        "a",
        "b",
    ]
