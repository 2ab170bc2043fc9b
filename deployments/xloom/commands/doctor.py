"""`xloom doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.commands import checks
from xloom.commands.checks import Finding
from xloom.commands.kubernetes_checks import examine_cluster
from xloom.commands.settings_checks import check_settings, failed
from xloom.protocol import XloomError
from xloom.quantization import recipes
from xloom.quantization.fitting import available_memory
from xloom.settings import Settings, load_settings

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def examine(settings: Settings) -> list[Finding]:
    """All findings about this machine, for these settings."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = checks.cpu_flags()
    store = Path(settings.store.path).expanduser()
    findings: list[Finding | None] = [
        checks.check_python(),
        *checks.check_packages(checks.installed_versions()),
        *checks.check_backends(importlib.metadata.entry_points(group="xloom.backends")),
        checks.check_cpu(flags, platform.machine(), cores),
        checks.check_devices(),
        checks.check_memory(available_memory(), checks.memory_needed(settings, flags)),
        checks.check_shared_memory(),
        checks.check_disk(store),
        *checks.check_compiler(settings.engine.compile),
        checks.check_traces(settings.observability.traces),
        *check_settings(settings),
        checks.check_port(settings.router.host, settings.router.port),
        checks.check_hub(),
    ]
    return [finding for finding in findings if finding is not None]


def report(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table, with each cure under what it mends."""
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        colour = COLOURS[finding.level]
        cure = f"\n[bold]{escape(finding.cure)}[/bold]" if finding.cure else ""
        table.add_row(f"[{colour}]{finding.level}[/{colour}]", escape(finding.check), escape(finding.detail) + cure)
    console.print(table)


def diagnose(file: Path | None, console: Console, *, as_json: bool) -> int:
    """Examine this machine for a settings file; 1 when serving can't work here. Raises `XloomError`."""
    try:
        findings = examine(load_settings(file))
    except XloomError as error:
        if error.code != "invalid_settings":
            raise
        findings = [failed("settings", error)]
    serves = not any(finding.level == "fail" for finding in findings)
    local = any(finding.level == "ok" and finding.check.startswith("backend ") for finding in findings)
    if as_json:
        data = {"serves": serves, "local": local, "findings": [asdict(finding) for finding in findings]}
        console.print_json(data=data)
    else:
        report(findings, console)
        verdict = "[green]Serving can work here.[/green]" if serves else "[red]Serving can't work here.[/red]"
        console.print(f"\n{verdict}{' xloom chat and xloom generate can run.' if local else ''}")
    return 0 if serves else 1


def diagnose_cluster(values: Path | None, namespace: str, console: Console, *, as_json: bool) -> int:
    """Examine the cluster that kubectl reaches, for the chart; 1 when an installation can't work there.

    Raises `XloomError` (no_cluster, invalid_settings).
    """
    findings = examine_cluster(namespace, values)
    works = not any(finding.level == "fail" for finding in findings)
    if as_json:
        console.print_json(data={"installs": works, "findings": [asdict(finding) for finding in findings]})
    else:
        report(findings, console)
        can = "[green]The chart can be installed" if works else "[red]The chart can't be installed"
        console.print(f"\n{can} in the namespace {escape(namespace)}.[/]")
    return 0 if works else 1


def show_isq(console: Console, *, as_json: bool) -> int:
    """Print what each way of quantising is on each device, or why it is refused."""
    rows = recipes.table()
    if as_json:
        console.print_json(data=rows)
        return 0
    table = Table(box=None, padding=(0, 1))
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row.values()))
    console.print(table)
    return 0
