"""`xloom check`: proof on this machine that a deployment serves what it was asked to."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.protocol import XloomError
from xloom.settings import Settings, load_settings

if TYPE_CHECKING:
    from xloom.engines.base import LLMBackend
    from xloom.verification.judgement import Finding, Observed
    from xloom.verification.loading import LoadedReference
    from xloom.verification.proof import Target
    from xloom.verification.speed import Speed

PROMPTS, QUICK_PROMPTS = 6, 3
COLUMNS = {
    "reference": "equals the reference",
    "effect": "has an effect",
    "gates": "off the plain sum",
    "unchanged": "unchanged by others",
    "batch": "mixed batch as alone",
    "eager": "compiled as eager",
}
MARKS = {"ok": "[green]ok[/green]", "failed": "[red]failed[/red]", "not compared": "[yellow]not compared[/yellow]"}


def add_parser(commands: Any, positive: Any) -> None:
    """The command's options."""
    text = (
        "Prove on this machine that a deployment serves what it was asked to: its model, adapters and mixtures through "
        "its engine and through plain torch. Exits with 0 when all is proved, with 1 when something failed or could "
        "not be compared."
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="Prove on this machine that a deployment serves what it was asked to.",
        description=text,
        epilog="example: xloom check settings.yaml --only blend --quick",
    )
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this adapter or mixture alone, beside the base; may be repeated"
    )
    parser.add_argument(
        "--prompts", type=positive, metavar="N", help=f"how many (default: {PROMPTS}; {QUICK_PROMPTS} with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer prompts, no speed, one engine")
    parser.add_argument(
        "--eager", action="store_true", help="also compare with an engine that does not compile (on a GPU: by itself)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    parser.set_defaults(run=run)


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


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Check as the command line says. Raises `XloomError`."""
    settings = chosen(load_settings(arguments.settings), arguments.only)
    # vLLM logs to standard output, which is the report's.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with Console(stderr=True).status("Loading") as status, TemporaryDirectory(prefix="xloom-check-") as scratch:
        check = Check(settings, Path(scratch), lambda text: status.update(escape(text)))
        report = check.run(
            arguments.prompts or (QUICK_PROMPTS if arguments.quick else PROMPTS),
            eager=arguments.eager or None if not arguments.quick else arguments.eager,
            speed=not arguments.quick,
        )
    if arguments.json:
        console.print_json(data=asdict(report) | {"verdict": report.verdict})
    else:
        show(report, console)
    return 0 if report.verdict == "proved" else 1


def chosen(settings: Settings, only: Sequence[str] | None) -> Settings:
    """The settings with the named adapters and mixtures alone. Raises `XloomError` (model_not_found)."""
    if not only:
        return settings
    known = [entry.name for entry in (*settings.adapters, *settings.xlora)]
    for name in only:
        if name not in known:
            names = ", ".join(known) or "none"
            raise XloomError("model_not_found", f"The settings have no adapter or mixture {name!r}.", f"Known: {names}.")
    return settings.model_copy(
        update={
            "adapters": [entry for entry in settings.adapters if entry.name in only],
            "xlora": [entry for entry in settings.xlora if entry.name in only],
        }
    )


class Check:
    """One check of one deployment: the engine first, then, with the memory free again, the reference."""

    def __init__(self, settings: Settings, scratch: Path, progress: Any) -> None:
        from xloom.engines.registry import backend_for

        self._settings, self._scratch, self._progress = settings, scratch, progress
        self._kind = backend_for(settings)
        self._speed: list[Speed] = []

    def run(self, count: int, *, eager: bool | None, speed: bool) -> Report:
        """Check with `count` prompts; `eager` None: on a GPU. Raises `XloomError`."""
        from xloom.commands.local import read_tokenizer
        from xloom.verification.judgement import judge
        from xloom.verification.proof import empty, mixtures
        from xloom.verification.prompts import prompts

        began = time.monotonic()
        settings = self._settings
        targets = self._prepare()
        self._tokenizer = read_tokenizer(settings)
        self._vocabulary = _vocabulary(settings)
        room = settings.engine.max_model_len // 2
        asked = prompts(self._tokenizer, count, vocabulary=self._vocabulary, room=room)
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
        from xloom.adapters.catalog import AdapterCatalog
        from xloom.adapters.manifest import Overrides
        from xloom.verification.proof import Target

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
        for adapter in settings.adapters:
            self._progress(f"Preparing {adapter.name}")
            entries.append(catalog.add(adapter.name, adapter.source, "lora"))
        for bundle in settings.xlora:
            self._progress(f"Preparing {bundle.name}")
            overrides = Overrides(bundle.top_k, bundle.temperature, bundle.mixing_mode)
            entries.append(catalog.add(bundle.name, bundle.source, "xlora", overrides))
        self._rank = max([64, *(entry.rank for entry in entries)])
        return [Target(entry.ref, folder / "prepared" / entry.generation) for entry in entries]

    async def _load(self, **engine: Any) -> LLMBackend:
        settings = self._settings
        rank = settings.engine.max_lora_rank
        return await self._kind.load(
            settings.model,
            settings.engine.model_copy(update=engine),
            xlora=settings.xlora_enabled,
            max_lora_rank=self._rank if rank == "auto" else rank,
            isq=settings.isq,
        )

    async def _observe(self, targets: list[Target], asked: list[list[int]], *, speed: bool) -> Observed:
        from xloom.verification.engine import reading
        from xloom.verification.proof import observe

        self._progress("Starting the engine")
        backend = await self._load()
        try:
            async with reading(backend) as ask:
                observed = await observe(backend, ask, targets, asked, lambda text: self._progress(f"Asking: {text}"))
                if speed:
                    self._speed = await self._measure(ask, targets, observed)
                return observed
        finally:
            await backend.close()

    async def _measure(self, ask: Any, targets: list[Target], observed: Observed) -> list[Speed]:
        from xloom.verification.prompts import random_prompt
        from xloom.verification.speed import ROWS, measure

        engine = self._settings.engine
        rows = min(ROWS, engine.max_num_seqs)
        asked = [random_prompt(self._tokenizer, self._vocabulary, 1000 + number) for number in range(rows)]
        served = [target for target in targets if target.name in observed.alone]
        adapter = next((target.ref for target in served if target.ref.kind == "lora"), None)
        mixture = next((target.ref for target in served if target.ref.kind == "xlora"), None)
        longest = engine.max_model_len
        return await measure(ask, asked, adapter, mixture, rows=rows, longest=longest, progress=self._progress)

    async def _observe_eager(self, targets: list[Target], asked: list[list[int]], observed: Observed) -> None:
        from xloom.verification.engine import reading
        from xloom.verification.proof import observe_eager

        self._progress("Starting an engine that does not compile")
        backend = await self._load(compile=False)
        try:
            async with reading(backend) as ask:
                progress = lambda text: self._progress(f"Asking: {text}")  # noqa: E731
                await observe_eager(backend, ask, targets, asked, observed, progress)
        finally:
            await backend.close()

    def _expect(self, targets: list[Target], asked: list[list[int]], observed: Observed) -> tuple[str, Any]:
        """Where the reference ran, or why it did not, and what it says."""
        from xloom.verification.judgement import Expected
        from xloom.verification.loading import load_reference
        from xloom.verification.proof import expect

        gc.collect()  # a backend in this process lets go of its model
        settings = self._settings
        self._progress("Loading the reference")
        reference: LoadedReference | None = None
        try:
            ranks = settings.engine.tensor_parallel_size
            reference = load_reference(settings.model, settings.isq, self._kind.device(), ranks)
            progress = lambda text: self._progress(f"Computing: {text}")  # noqa: E731
            return str(reference.place), expect(reference, targets, asked, observed, progress)
        except XloomError as error:
            if error.code != "no_reference":
                raise
            return error.message, Expected(missing=error.message)
        finally:
            if reference is not None:
                reference.close()


def _vocabulary(settings: Settings) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model.source, revision=settings.model.revision)
    return int(config.get_text_config().vocab_size)


def show(report: Report, console: Console) -> None:
    """Print a row for each model and a column for each proof, then what is not well, with its cure."""
    console.print(
        f"{escape(report.model)} on {report.backend}, {report.device}, dtype {report.dtype}; "
        f"reference: {escape(report.reference)}; {report.prompts} prompts, {report.seconds:.0f} s",
        soft_wrap=True,
    )
    console.print("Mean difference of log-probabilities in nats, and what it may be.\n")
    by_subject: dict[str, dict[str, Finding]] = {}
    for finding in report.findings:
        by_subject.setdefault(finding.subject, {})[finding.proof] = finding
    proofs = [proof for proof in COLUMNS if any(proof in row for row in by_subject.values())]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", *(COLUMNS[proof] for proof in proofs)):
        table.add_column(column)
    for subject, row in by_subject.items():
        cells = [_cell(row[proof]) if proof in row else "" for proof in proofs]
        table.add_row(escape(subject), *(["[red]not loaded[/red]"] if "loads" in row else cells))
    console.print(table)
    for finding in report.findings:
        if finding.verdict != "ok":
            name = COLUMNS.get(finding.proof, finding.proof)
            text = f"\n{MARKS[finding.verdict]} {escape(finding.subject)}, {name}: {escape(finding.detail)}"
            console.print(text, soft_wrap=True)
            if finding.cure:
                console.print(f"[bold]{escape(finding.cure)}[/bold]", soft_wrap=True)
    if report.speed:
        _show_speed(report.speed, console)
    words = {
        "proved": "[green]Proved: it serves what it was asked to.[/green]",
        "failed": "[red]Failed: it does not serve what it was asked to.[/red]",
        "incomplete": "[yellow]Incomplete: nothing was found wrong, and not all could be compared.[/yellow]",
    }
    console.print(f"\n{words[report.verdict]}")


def _cell(finding: Finding) -> str:
    if finding.measured is None:
        return MARKS[finding.verdict]
    sign = ">" if finding.proof in ("effect", "gates") else "≤"
    return f"{MARKS[finding.verdict]} {finding.measured:.2g} [dim]{sign} {finding.limit:.2g}[/dim]"


def _show_speed(speed: list[Speed], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("rows", "tokens/s", "a row, to base"):
        table.add_column(column, justify="right")
    for case in speed:
        table.add_row(escape(case.case), str(case.rows), f"{case.tokens_per_second:,.0f}", f"{case.ratio:.2f}")
    console.print()
    console.print(table)
