"""Backends side by side on the sample model, through the one interface they share.

Each backend runs in a process of its own; all are up at once, and the parent lets one at a time work, so that rounds
alternate between them. Output is tokens a second over whole requests, prompts included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from xloom.engines import registry
from xloom.protocol import AdapterRef, XloomError
from xloom.settings import SAMPLE, EngineSettings, ModelSettings

from .backends_tables import Figures, install_table, memory_table, speed
from .machine import machine
from .processes import memory
from .sessions import Driver
from .tables import Table, markdown

CLASSES = {
    "vllm": "xloom.vllm.engine.backend:VLLMBackend",
    "transformers": "xloom.engines.transformers.backend:TransformersBackend",
    "mistralrs": "xloom.engines.mistralrs.backend:MistralRsBackend",
}
PROMPT_TOKENS, VOCABULARY = 32, 4000
CONCURRENT = (1, 16, 64)
NEW_TOKENS = {"base": 64, "xlora": 24}
ANSWER = "@ "  # begins a worker's answer; engines write to standard output too
console = Console(stderr=True)


@dataclass(frozen=True)
class Load:
    """So many sessions at once, of one kind."""

    kind: str  # base or xlora
    concurrent: int

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.concurrent}"


@dataclass
class Worker:
    """A process with one engine in it."""

    figures: Figures
    process: subprocess.Popen[str]
    log: Path

    @classmethod
    def start(cls, name: str, options: list[str], log: Path) -> Worker:
        """Start it, and wait until its engine has loaded."""
        command = [sys.executable, "-m", "benchmarks.backends", "--worker", name, *options]
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        worker = cls(Figures(name), process, log)
        ready = worker.answer()
        worker.figures.load_seconds, worker.figures.xlora = ready["load_seconds"], ready["xlora"]
        return worker

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises `RuntimeError` with the end of its log when the process has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        raise RuntimeError(f"{self.figures.name} ended: {self.log.read_text(errors='replace')[-2000:]}")

    def run(self, load: Load, seed: int, *, count: bool = True) -> None:
        """One burst; counted unless it only warms up. A load that failed once is not tried again."""
        figures = self.figures
        if load.key in figures.failed or (load.kind == "xlora" and not figures.xlora):
            return
        assert self.process.stdin is not None
        tokens = NEW_TOKENS[load.kind] if count else 8
        asked = {"kind": load.kind, "concurrent": load.concurrent, "new_tokens": tokens, "seed": seed}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        if "error" in answer:
            figures.failed[load.key] = answer["error"]
        elif count:
            figures.rates.setdefault(load.key, []).append(answer["rate"])
            figures.firsts.setdefault(load.key, []).append(answer["first_ms"])

    def close(self) -> None:
        """Note the memory, then let it end."""
        self.figures.peak = sum(part.peak for part in memory(psutil.Process(self.process.pid)).values())
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def work(name: str, model: Path, prepared: Path | None, rank: int) -> None:
    """A worker's life: load, then one burst for each line of standard input, until it ends."""
    backend = registry.load_backend(CLASSES.get(name, name))
    xlora = prepared is not None and backend.device() in backend.capabilities().xlora
    start = time.perf_counter()
    settings = EngineSettings(dtype="float32", max_num_seqs=max(CONCURRENT), max_model_len=512)
    engine = await backend.load(ModelSettings(source=str(model)), settings, xlora=xlora, max_lora_rank=rank)
    blend = AdapterRef("blend", "bench", "xlora")
    if xlora and prepared is not None:
        await engine.add_adapter(blend, prepared)
    driver = Driver(engine)
    _say({"load_seconds": time.perf_counter() - start, "xlora": xlora})
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        rng = random.Random(asked["seed"])
        prompts = [[rng.randrange(5, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(asked["concurrent"])]
        adapter = blend if asked["kind"] == "xlora" else None
        try:
            burst = await driver.run(prompts, [asked["new_tokens"]] * len(prompts), adapter)
        except XloomError as error:
            _say({"error": str(error)})
            continue
        if burst.complete < len(prompts):
            _say({"error": f"{len(prompts) - burst.complete} of {len(prompts)} requests failed"})
            continue
        _say({"rate": burst.tokens_per_second, "first_ms": burst.median_first_token_ms})
    await driver.close()


def _say(answer: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(answer), flush=True)


def measure(names: list[str], options: list[str], rounds: int, loads: Sequence[Load]) -> list[Figures]:
    """All backends, round by round. The workers have ended when it returns."""
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in track(names, "starting", console=console):
                workers.append(Worker.start(name, options, Path(folder) / f"{name}.log"))
            for worker in workers:  # once for nothing: caches, lazy compilation
                for load in loads:
                    worker.run(load, 0, count=False)
            for number in track(range(1, rounds + 1), "rounds", console=console):
                for load in loads:
                    for worker in workers:
                        worker.run(load, number)
        finally:
            for worker in workers:
                worker.close()
    return [worker.figures for worker in workers]


def tables(figures: list[Figures], rounds: int, concurrent: Sequence[int]) -> list[Table]:
    """The result as the tables of the report."""

    def note(kind: str) -> str:
        failures = "".join(
            f" {each.name} failed at {key}: {why}."
            for each in figures
            for key, why in each.failed.items()
            if key.startswith(kind)
        )
        return (
            f"Medians of {rounds} alternating rounds; {PROMPT_TOKENS} prompt tokens and {NEW_TOKENS[kind]} output "
            f"tokens a session, greedy, float32; all sessions start together.{failures}"
        )

    mixing = [each for each in figures if each.xlora]
    found = [speed("Base model", "base", figures, concurrent, note("base"))]
    if mixing:
        found.append(speed("X-LoRA", "xlora", mixing, concurrent, note("xlora")))
    return [*found, memory_table(figures), install_table()]


def usable(names: list[str]) -> list[str]:
    """Those that can run here; says why of the others."""
    found = []
    for name in names:
        try:
            missing = registry.load_backend(CLASSES.get(name, name)).missing()
        except XloomError as error:
            missing = str(error)
        if missing is None:
            found.append(name)
        else:
            console.print(f"{name} is left out: {missing}")
    return found


def worker_options(model: Path | None, sample: Path, folder: Path) -> list[str]:
    """What the workers are started with: the sample with its bundle, or another model alone."""
    if model is not None:
        return ["--model", str(model)]
    # They import torch, which a worker's memory shall not show unless its backend does.
    from xloom.mixtures.modules import linear_modules
    from xloom.mixtures.prepare import prepare_bundle

    base, prepared = sample / "base", folder / "blend"
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    made = prepare_bundle(
        sample / "blend", linear_modules(str(base)), prepared, hidden_size=hidden, max_rank=256,
    )  # fmt: skip
    return ["--model", str(base), "--prepared", str(prepared), "--rank", str(made.rank)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backends",
        description=__doc__,
        epilog="example: python -m benchmarks.backends --backends vllm mistralrs --json backends.json",
    )
    parser.add_argument("--backends", nargs="+", default=list(CLASSES), metavar="NAME", help="(%(default)s)")
    parser.add_argument("--sample", type=Path, default=SAMPLE, help="folder with base/ and blend/ (the shipped one)")
    parser.add_argument("--model", type=Path, help="another model's folder: base requests only")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--concurrent", type=int, nargs="+", default=list(CONCURRENT), choices=CONCURRENT)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        asyncio.run(work(options.worker, options.model, options.prepared, options.rank))
        return
    found = machine()
    kinds = ("base",) if options.model else ("base", "xlora")
    loads = [Load(kind, count) for kind in kinds for count in options.concurrent]
    with tempfile.TemporaryDirectory() as folder:
        given = worker_options(options.model, options.sample, Path(folder))
        figures = measure(usable(options.backends), given, options.rounds, loads)
    result = {
        "name": "backends",
        "machine": found,
        "tables": tables(figures, options.rounds, options.concurrent),
        "raw": {each.name: {"rates": each.rates, "first_ms": each.firsts} for each in figures},
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    for table in result["tables"]:
        print(f"\n{markdown(table)}")


if __name__ == "__main__":
    main()
