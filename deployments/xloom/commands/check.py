"""`xloom check`: proof on this machine that a deployment serves what it was asked to."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.protocol import XloomError
from xloom.settings import Settings, load_settings

if TYPE_CHECKING:
    from xloom.commands.deployment_check import Report
    from xloom.verification.judgement import Finding
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
        "--only", action="append", metavar="NAME", help="this adapter or mixture alone; may be repeated"
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


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Check as the command line says. Raises `XloomError`."""
    settings = chosen(load_settings(arguments.settings), arguments.only)
    # vLLM logs to standard output, which is the report's.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from xloom.commands.deployment_check import DeploymentCheck

    with Console(stderr=True).status("Loading") as status, TemporaryDirectory(prefix="xloom-check-") as scratch:
        check = DeploymentCheck(settings, Path(scratch), lambda text: status.update(escape(text)))
        report = check.run(
            arguments.prompts or (QUICK_PROMPTS if arguments.quick else PROMPTS),
            eager=arguments.eager or (False if arguments.quick else None),
            speed=not arguments.quick,
        )
    if arguments.json:
        findings = [asdict(finding) | {"measured": _finite(finding.measured)} for finding in report.findings]
        console.print_json(data=asdict(report) | {"findings": findings, "verdict": report.verdict})
    else:
        show(report, console)
    return 0 if report.verdict == "proved" else 1


def chosen(settings: Settings, only: Sequence[str] | None) -> Settings:
    """The settings with the named adapters and mixtures alone. Raises `XloomError` (model_not_found)."""
    if not only:
        return settings
    known = settings.names
    for name in only:
        if name not in known:
            names = ", ".join(known) or "none"
            raise XloomError("model_not_found", f"The settings have no adapter or mixture {name!r}.", f"Known: {names}")
    mixtures = [entry for entry in settings.mixtures if entry.name in only]
    mixed = {name for entry in mixtures for name in (*entry.adapters, *entry.subtract)}
    # Ready for mixtures as the whole deployment is: with them left out it might be another engine.
    engine = settings.engine.model_copy(
        update={"enable_xlora": settings.xlora_enabled, "input_gates": settings.input_gates_enabled}
    )
    return settings.model_copy(
        update={
            "engine": engine,
            "adapters": [entry for entry in settings.adapters if entry.name in only or entry.name in mixed],
            "xlora": [entry for entry in settings.xlora if entry.name in only],
            "mixtures": mixtures,
        }
    )


def _finite(number: float | None) -> float | None:
    """JSON has no NaN, which an engine's log-probabilities may."""
    return number if number is not None and math.isfinite(number) else None


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
