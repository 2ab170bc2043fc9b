"""The proof that an adapter with `verify: true` must pass in a replica before it is served: a few prompts.

Through the replica's own engine, beside whatever else it serves: has an effect, base unchanged, a mixture is not the
plain sum of its adapters (served for a moment from the same files without the router), a mixed batch equals each alone.
A reference beside the engine is computed on the CPU, and only of a small model (`REFERENCE_BYTES`): a large one would
take the memory or the time that serving needs. `xloom check` compares those too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.engines.base import LLMBackend
from xloom.mixtures.options import ROUTER_FILE, XLORA_FILE
from xloom.protocol import AdapterRef, XloomError
from xloom.quantization.fitting import GIB
from xloom.verification.comparison import Scores
from xloom.verification.engine import Ask, one_by_one
from xloom.verification.judgement import Expected, Finding, Observed, judge
from xloom.verification.loading import load_reference
from xloom.verification.prompts import Prompter
from xloom.verification.proof import NEW_TOKENS, Target, empty, expect, mixtures, observe

if TYPE_CHECKING:
    from xloom.settings import Settings

logger = logging.getLogger(__name__)

PROMPTS = 3
REFERENCE_BYTES = 4 * GIB  # that a reference may take: a billion parameters in float32, more than half that in seconds


class Admission:
    """Loads adapters into one engine, one at a time, and proves them."""

    def __init__(self, backend: LLMBackend, ask: Ask, settings: Settings) -> None:
        self._backend, self._ask, self._settings = backend, ask, settings
        self._prompts: list[list[int]] | None = None
        self._one = asyncio.Lock()  # what is loaded meanwhile may not change the base's answers

    async def admit(self, ref: AdapterRef, folder: Path) -> None:
        """Load a prepared adapter or bundle; it stays loaded only when it passes.

        Raises `XloomError`: adapter_not_verified, and what loading raises.
        """
        async with self._one:
            target = Target(ref, folder)
            try:
                findings = await self._prove(target)
            except BaseException:
                with contextlib.suppress(Exception):  # of an engine that has died: the first error tells
                    await self._backend.remove_adapter(ref)
                raise
            failed = [finding for finding in findings if finding.verdict == "failed"]
            if failed:
                await self._backend.remove_adapter(ref)
                raise _not_verified(ref.name, failed)
            unsaid = sorted({finding.proof for finding in findings if finding.verdict != "ok"})
            but = f"; not compared: {', '.join(unsaid)}" if unsaid else ""
            logger.info("adapter %s is verified, generation %s%s", ref.name, ref.generation[:12], but)

    async def _prove(self, target: Target) -> list[Finding]:
        prompts = await self._asked()
        observed = await observe(self._backend, self._ask, [target], prompts, lambda text: None)
        if target.name in observed.refused:
            raise observed.refused[target.name]
        count = target.num_adapters
        if count > 1:
            observed.summed[target.name] = await self._summed(target, prompts)
        expected = await asyncio.to_thread(self._expected, target, prompts, observed)
        settings = self._settings
        nothing = await asyncio.to_thread(empty, [target])
        return judge(observed, expected, mixtures([target]), nothing, settings.model.served_name, settings.engine.dtype)

    async def _asked(self) -> list[list[int]]:
        if self._prompts is None:
            prompter = await asyncio.to_thread(Prompter.open, self._settings.model)
            self._prompts = prompter.prompts(PROMPTS, max_tokens=self._settings.engine.max_model_len // 2)
        return self._prompts

    async def _summed(self, target: Target, prompts: list[list[int]]) -> list[Scores]:
        """What the plain sum of a mixture's adapters answers: the same files without the router."""
        plain = AdapterRef(f"{target.name}.sum", target.ref.generation, "lora")
        with tempfile.TemporaryDirectory(prefix="xloom-sum-") as scratch:
            folder = Path(scratch) / "sum"
            router = shutil.ignore_patterns(XLORA_FILE, ROUTER_FILE)
            await asyncio.to_thread(shutil.copytree, target.folder, folder, ignore=router)
            try:
                await self._backend.add_adapter(plain, folder)
                return await one_by_one(self._ask, prompts, plain, NEW_TOKENS)
            finally:
                await self._backend.remove_adapter(plain)

    def _expected(self, target: Target, prompts: list[list[int]], observed: Observed) -> Expected:
        settings = self._settings
        try:
            reference = load_reference(
                settings.model,
                settings.isq,
                self._backend.device(),
                settings.engine.tensor_parallel_size,
                most_bytes=REFERENCE_BYTES,
            )
        except XloomError as error:
            if error.code != "no_reference":
                raise
            return Expected(missing=error.message)
        try:
            return expect(reference, [target], prompts, observed, lambda text: None)
        finally:
            reference.close()


def _not_verified(name: str, failed: list[Finding]) -> XloomError:
    reasons = " ".join(f"{finding.subject}, {finding.proof}: {finding.detail}" for finding in failed)
    return XloomError(
        "adapter_not_verified", f"{name!r} did not pass its proof: {reasons}", "See docs/check.md, and xloom check."
    )
