"""HTTP through xloom's router and replica beside bare `vllm serve`, under vLLM's own client.

Each other server is alive beside the baseline and they are loaded in turn; ratios are of medians. With it: where
the processor time of an output token goes, where the time to the first token goes, and memory, by process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from xloom.settings import SAMPLE

from .client import Client, ClientError, Load
from .http_tables import tables
from .machine import machine, machine_line
from .servers import KINDS, MODEL, Server, StartError
from .side_by_side import Side, SideBySide, run_side_by_side
from .tables import markdown

BASELINE = "vllm"
INPUT_TOKENS, OUTPUT_TOKENS = 128, 128
console = Console(stderr=True)


def load(concurrent: int, scale: float) -> Load:
    """Enough requests for a few seconds at the speed of a small model: 3 waves at 64, 16 requests at one."""
    waves = 16 if concurrent == 1 else max(3, 64 // concurrent)
    requests = max(concurrent, round(scale * waves * concurrent))
    return Load(concurrent, requests, INPUT_TOKENS, OUTPUT_TOKENS)


def measure(
    model: Path, rivals: list[str], loads: list[Load], rounds: int, folder: Path, *, compiled: bool
) -> tuple[list[SideBySide], list[str]]:
    """The comparisons that could be made, and a line for each that could not."""
    compared, missed = [], []
    with console.status("Starting the client") as status, Client(model, MODEL, folder) as client:

        def tell(text: str) -> None:
            if console.is_terminal:
                status.update(text)
            else:
                console.print(text, highlight=False)

        tell("Starting the baseline")
        with Server(KINDS[BASELINE], model, folder, compiled=compiled) as baseline:
            for name in rivals:
                tell(f"Starting {name}")
                try:
                    with Server(KINDS[name], model, folder, compiled=compiled) as rival:
                        compared.append(run_side_by_side(baseline, rival, client, loads, rounds, tell))
                        tell(f"Stopping {name}")
                except (StartError, ClientError) as error:
                    console.print(str(error), style="red", markup=False, highlight=False)
                    missed.append(f"{KINDS[name].text} did not run here.")
    return compared, missed


def raw(compared: list[SideBySide]) -> list[dict[str, Any]]:
    """All runs, for those who want other statistics."""

    def side(of: Side) -> dict[str, Any]:
        return {
            "name": of.name,
            "idle": of.idle,
            "runs": {
                count: [dataclasses.asdict(sample) for sample in samples] for count, samples in of.samples.items()
            },
            "memory": {part: dataclasses.asdict(found) for part, found in of.memory.items()},
        }

    return [{"baseline": side(both.baseline), "rival": side(both.rival)} for both in compared]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http",
        description=__doc__,
        epilog="example: python -m benchmarks.http --servers xloom --concurrency 1,64 --rounds 5 --json http.json",
    )
    rivals = [name for name in KINDS if name != BASELINE]
    parser.add_argument(
        "--model", type=Path, default=SAMPLE / "base", help="folder of a small model (the sample's base)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (%(default)s)")
    parser.add_argument("--concurrency", default="1,16,64", help="requests at a time (%(default)s)")
    parser.add_argument("--servers", default=",".join(rivals), help="compared with vllm, in this order (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of requests (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="engines in eager mode: quicker to start, slower to run")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    return parser


def main() -> int:
    """Measure and print."""
    parser = build_parser()
    options = parser.parse_args()
    rivals = [name for name in options.servers.split(",") if name]
    unknown = [name for name in rivals if name not in KINDS or name == BASELINE]
    if unknown:
        parser.error(
            f"no server {', '.join(unknown)}; there are {', '.join(name for name in KINDS if name != BASELINE)}"
        )
    if not (options.model / "config.json").exists():
        parser.error(f"{options.model} holds no model")
    loads = [load(int(count), options.scale) for count in options.concurrency.split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    found = machine()
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:
        folder = Path(temporary)
        if options.logs:
            folder = options.logs.resolve()
            folder.mkdir(parents=True)
        try:
            model, compiled = options.model.resolve(), not options.eager
            compared, missed = measure(model, rivals, loads, options.rounds, folder, compiled=compiled)
        except (StartError, ClientError) as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            return 1
    if not compared:
        return 1
    shown = tables(compared, loads, options.rounds, missed)
    result = {"name": "http", "machine": found, "tables": shown, "raw": raw(compared)}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(machine_line(found))
    if any(both.disturbed(each.concurrent) for both in compared for each in loads):
        console.print("Other processes kept this machine busy: these figures are not results.", style="red")
    for table in shown:
        print(f"\n{markdown(table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
