"""X-LoRA's figures from an engine to a replica's counters."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.fakes import FakeBackend
from xloom.observability import table
from xloom.observability.recorder import Recorder
from xloom.protocol import BundleFigures, MixtureFigures
from xloom.replica.mixture_metrics import MixtureMetrics

FIGURES = MixtureFigures(
    [BundleFigures("blend", 10, {"code": 7.5, "maths": 2.5}, 4.0), BundleFigures("blend", 5, {"code": 5.0}, 0.0)],
    steps=2, seconds=0.5, scaling_seconds=0.2, routing_seconds=0.1,
)  # fmt: skip


class Engine(FakeBackend):
    """Says what it was given, once each."""

    def __init__(self, answers: list[MixtureFigures | Exception]) -> None:
        super().__init__()
        self.answers = answers
        self.all_said = asyncio.Event()

    async def mixture(self) -> MixtureFigures | None:
        if not self.answers:
            self.all_said.set()
            return None
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_growth_is_added_up_and_both_generations_of_a_bundle_count() -> None:
    recorder = Recorder()
    meter = MixtureMetrics(Engine([FIGURES, FIGURES]), recorder, "replica-1")
    for _ in range(3):
        await meter.read()
    assert recorder.value(table.XLORA_TOKENS, bundle="blend") == 30
    assert recorder.value(table.XLORA_GATES, bundle="blend", adapter="code") == 25
    assert recorder.value(table.XLORA_GATES, bundle="blend") == recorder.value(table.XLORA_TOKENS, bundle="blend")
    assert recorder.value(table.XLORA_ENTROPY, bundle="blend") == 8
    assert recorder.value(table.XLORA_STEPS, replica="replica-1") == 4
    assert recorder.value(table.XLORA_STEPS_SECONDS, replica="replica-1") == pytest.approx(1.0)
    assert recorder.value(table.XLORA_SCALING_SECONDS, replica="replica-1") == pytest.approx(0.4)
    assert recorder.value(table.XLORA_ROUTING_SECONDS, replica="replica-1") == pytest.approx(0.2)


async def test_an_engine_that_can_not_say_is_asked_again_and_complained_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    failures: list[MixtureFigures | Exception] = [RuntimeError("no"), RuntimeError("no"), FIGURES]
    engine = Engine(failures)
    meter = MixtureMetrics(engine, recorder, "replica-1", period_s=0.001)
    with caplog.at_level(logging.WARNING):
        meter.start()
        await asyncio.wait_for(engine.all_said.wait(), 30)
        await meter.close()
    assert recorder.value(table.XLORA_STEPS) == 2
    assert len(caplog.records) == 1
