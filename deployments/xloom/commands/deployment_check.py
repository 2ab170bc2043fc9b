"""One check of one deployment: its engine, its reference, and what they come to. `xloom check` shows it."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xloom.adapters.catalog import AdapterCatalog
from xloom.adapters.wanted import wanted
from xloom.app import lora_rank, own_rules
from xloom.engines.base import LLMBackend
from xloom.engines.registry import backend_for
from xloom.protocol import XloomError
from xloom.settings import Settings
from xloom.verification.engine import Ask, reading
from xloom.verification.judgement import Expected, Finding, Observed, judge
from xloom.verification.loading import LoadedReference, load_reference
from xloom.verification.prompts import Prompter
from xloom.verification.proof import Progress, Target, empty, expect, mixtures, observe, observe_eager
from xloom.verification.speed import ROWS, Speed, measure


@dataclass
class Report:
    """What a check came to."""

    model: str
    backend: str
    device: str
    dtype: str
    reference: str  # where it ran, or why it did not
    prompts: int
    findings: list[Finding]
    speed: list[Speed] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """proved, failed, or incomplete: nothing is wrong, and not all could be compared."""
        verdicts = {finding.verdict for finding in self.findings}
        return "failed" if "failed" in verdicts else "incomplete" if "not compared" in verdicts else "proved"


class DeploymentCheck:
    """One check of one deployment: the engine first, then, with the memory free again, the reference."""

    def __init__(self, settings: Settings, scratch: Path, progress: Progress) -> None:
        self._settings, self._scratch, self._progress = settings, scratch, progress
        self._kind = backend_for(settings)
        self._speed: list[Speed] = []

    def run(self, count: int, *, eager: bool | None, speed: bool) -> Report:
        """Check with `count` prompts; `eager` None: on a GPU. Raises `XloomError`."""
        began = time.monotonic()
        settings = self._settings
        targets = self._prepare()
        self._prompter = Prompter.open(settings.model)
        asked = self._prompter.prompts(count, max_tokens=settings.engine.max_model_len // 2)
        device = self._kind.device()
        if eager is None:
            eager = device == "cuda"
        observed = asyncio.run(self._observe(targets, asked, speed=speed))
        if eager and settings.engine.compile:
            asyncio.run(self._observe_eager(targets, asked, observed))
        reference, expected = self._expect(targets, asked, observed)
        findings = judge(
            observed,
            expected,
            mixtures(targets),
            empty(targets),
            settings.model.served_name,
            settings.engine.dtype,
        )
        return Report(
            settings.model.source,
            self._kind.__name__,
            device,
            settings.engine.dtype,
            reference,
            count,
            findings,
            self._speed,
            round(time.monotonic() - began, 1),
        )

    def _prepare(self) -> list[Target]:
        """Every adapter and mixture, as the store would prepare it for replicas."""
        settings = self._settings
        folder = self._scratch / "store"
        folder.mkdir()
        catalog = AdapterCatalog(
            folder,
            settings.model.source,
            settings.store.max_rank,
            [settings.model.served_name],
            settings.model.revision,
        )
        entries = []
        for each in wanted(settings):
            self._progress(f"Preparing {each.name}")
            rules = own_rules(settings)
            entries.append(
                catalog.add(each.name, each.source, each.kind, each.overrides, rules=rules, blend=each.blend)
            )
        self._rank = lora_rank(settings, tuple(entries))
        return [Target(entry.ref, folder / "prepared" / entry.generation) for entry in entries]

    async def _load(self, **engine: Any) -> LLMBackend:
        settings = self._settings
        return await self._kind.load(
            settings.model,
            settings.engine.model_copy(update=engine),
            xlora=settings.xlora_enabled,
            max_lora_rank=self._rank,
            isq=settings.isq,
        )

    async def _observe(self, targets: list[Target], asked: list[list[int]], *, speed: bool) -> Observed:
        self._progress("Starting the engine")
        backend = await self._load()
        try:
            async with reading(backend) as ask:
                observed = await observe(backend, ask, targets, asked, self._asking)
                if speed:
                    self._speed = await self._measure(ask, targets, observed)
                return observed
        finally:
            await backend.close()

    async def _measure(self, ask: Ask, targets: list[Target], observed: Observed) -> list[Speed]:
        engine = self._settings.engine
        rows = min(ROWS, engine.max_num_seqs)
        asked = [self._prompter.random(1000 + number) for number in range(rows)]
        served = [target for target in targets if target.name in observed.alone]
        adapter = next((target.ref for target in served if target.ref.kind == "lora"), None)
        mixture = next((target.ref for target in served if target.ref.is_mixture), None)
        longest = engine.max_model_len
        return await measure(ask, asked, adapter, mixture, rows=rows, longest=longest, progress=self._progress)

    async def _observe_eager(self, targets: list[Target], asked: list[list[int]], observed: Observed) -> None:
        self._progress("Starting an engine that does not compile")
        backend = await self._load(compile=False)
        try:
            async with reading(backend) as ask:
                await observe_eager(backend, ask, targets, asked, observed, self._asking)
        finally:
            await backend.close()

    def _asking(self, what: str) -> None:
        self._progress(f"Asking the engine: {what}")

    def _computing(self, what: str) -> None:
        self._progress(f"Computing the reference: {what}")

    def _expect(self, targets: list[Target], asked: list[list[int]], observed: Observed) -> tuple[str, Expected]:
        """Where the reference ran, or why it did not, and what it says."""
        gc.collect()  # a backend in this process lets go of its model
        settings = self._settings
        self._progress("Loading the reference")
        reference: LoadedReference | None = None
        try:
            ranks = settings.engine.tensor_parallel_size
            reference = load_reference(settings.model, settings.isq, self._kind.device(), ranks)
            return str(reference.place), expect(reference, targets, asked, observed, self._computing)
        except XloomError as error:
            if error.code != "no_reference":
                raise
            return error.message, Expected(missing=error.message)
        finally:
            if reference is not None:
                reference.close()
