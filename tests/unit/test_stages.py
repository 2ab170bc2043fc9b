"""A start that is written to a file or a pipe says what it does, and for how long."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from xloom.stages import Stages


def test_each_stage_is_a_line_with_its_seconds() -> None:
    now, file = [0.0], io.StringIO()
    with Stages(Console(file=file), lambda: now[0]) as stages:
        stages.begin("Starting Ray")
        now[0] = 6.25
        stages.begin("Waiting for [it]")
        for seconds in (7, 22, 23, 40):
            now[0] = float(seconds)
            stages.still()
    assert file.getvalue().splitlines() == [
        "Starting Ray: 6.2 s",
        "Waiting for [it]: 16 s so far",
        "Waiting for [it]: 34 s so far",
        "Waiting for [it]: 33.8 s",
    ]


def test_a_stage_says_how_far_it_is() -> None:
    now, file = [0.0], io.StringIO()
    with Stages(Console(file=file), lambda: now[0]) as stages:
        stages.begin("Training")
        for seconds in (1, 16, 31):
            now[0] = float(seconds)
            stages.still(f"step {seconds} of [40]")
        stages.begin("Writing")
    assert file.getvalue().splitlines() == [
        "Training: 16 s so far, step 16 of [40]",
        "Training: 31 s so far, step 31 of [40]",
        "Training: 31.0 s",
        "Writing: 0.0 s",
    ]


def test_a_stage_that_fails_is_said_to_have_failed() -> None:
    file = io.StringIO()

    def fail() -> None:
        with Stages(Console(file=file), lambda: 1.0) as stages:
            stages.begin("Preparing adapters")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert file.getvalue() == "Preparing adapters: 0.0 s, and it failed\n"


def test_a_terminal_is_left_without_lines() -> None:
    file = io.StringIO()
    with Stages(Console(file=file, force_terminal=True), lambda: 1.0) as stages:
        stages.begin("Starting Ray")
    assert "Starting Ray:" not in file.getvalue()
