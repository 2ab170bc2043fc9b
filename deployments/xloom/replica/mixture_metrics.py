"""X-LoRA's figures from a replica's engine into its metrics."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from xloom.deadline import limited
from xloom.engines.base import LLMBackend
from xloom.observability import table
from xloom.observability.table import Metric
from xloom.protocol import MixtureFigures

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
ANSWER_S = 30.0  # the engine answers between two steps


class Counters(Protocol):
    """The part of `xloom.observability.recorder.Recorder` used here."""

    def inc(self, metric: Metric, amount: float = ..., **labels: object) -> None: ...


class MixtureMetrics:
    """Asks the engine each second and counts what it answers. Keeps no names of its own."""

    def __init__(self, backend: LLMBackend, counters: Counters, replica_id: str, period_s: float = PERIOD_S) -> None:
        self._backend, self._counters, self._replica_id = backend, counters, replica_id
        self._period_s = period_s
        self._task: asyncio.Task[None] | None = None
        self._failing = False

    def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self.read()

    async def read(self) -> None:
        """Ask once. Metrics are no reason to fail: an engine that has died is found by its health check."""
        try:
            async with limited(ANSWER_S, "The engine", "X-LoRA's figures"):
                figures = await self._backend.mixture()
            if figures is not None:
                self._count(figures)
            self._failing = False
        except Exception:
            if not self._failing:  # once, not each second
                logger.warning("X-LoRA's figures could not be read, serving goes on", exc_info=True)
            self._failing = True

    def _count(self, figures: MixtureFigures) -> None:
        inc, replica = self._counters.inc, self._replica_id
        for bundle in figures.bundles:
            inc(table.XLORA_TOKENS, bundle.tokens, bundle=bundle.name)
            inc(table.XLORA_ENTROPY, bundle.entropy, bundle=bundle.name)
            for adapter, total in bundle.gates.items():
                inc(table.XLORA_GATES, total, bundle=bundle.name, adapter=adapter)
        inc(table.XLORA_STEPS, figures.steps, replica=replica)
        inc(table.XLORA_STEPS_SECONDS, figures.seconds, replica=replica)
        inc(table.XLORA_SCALING_SECONDS, figures.scaling_seconds, replica=replica)
        inc(table.XLORA_ROUTING_SECONDS, figures.routing_seconds, replica=replica)
