"""What is paid by those who use none of it: base requests with xloom installed, with LoRA on, with mixtures on.

Engines with one model of random weights (about 200 M parameters) are up side by side and measured in turn; each is held
against the first, which is vLLM without xloom's plugin and without LoRA, by rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from .machine import machine
from .random_models import LARGE, write_model
from .rows import RANDOM, ROOT, Engine

SESSIONS, PROMPT, NEW = 16, 32, 40
console = Console(stderr=True)


def options_of(model: Path, *, lora: bool, mixtures: bool) -> dict[str, Any]:
    extra = RANDOM if lora else RANDOM | {"enable_lora": False}
    return {
        "model": str(model), "xlora": mixtures, "rank": 64, "vocabulary": LARGE["vocab_size"],
        "engine": {"dtype": "float32", "max_num_seqs": 64, "max_model_len": 1024, "extra_args": extra},
    }  # fmt: skip


def measure(engines: list[Engine], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each engine, a burst a round; the first to run changes from round to round."""
    found: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in track(range(-1, rounds), "unused", console=console):
        shift = turn % len(engines)
        for engine in engines[shift:] + engines[:shift]:
            answer = engine.run(kinds={"base": SESSIONS}, prompt=PROMPT, new=NEW, seed=turn)
            if turn >= 0:
                found[engine.name].append(answer["all"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m benchmarks.unused --rounds 12 --json unused.json"
    )
    parser.add_argument("--rounds", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, here = write_model(Path(folder) / "model", LARGE), ROOT / "deployments"
        plain = options_of(model, lora=False, mixtures=False)
        engines = [
            Engine("vLLM", here, plain, {"VLLM_PLUGINS": ""}),
            Engine("xloom installed", here, plain, {}),
            Engine("LoRA on", here, options_of(model, lora=True, mixtures=False), {}),
            Engine("mixtures on", here, options_of(model, lora=True, mixtures=True), {}),
        ]
        try:
            for engine in engines:
                engine.give({})
            for engine in engines:
                engine.wait()
            found = measure(engines, arguments.rounds)
        finally:
            for engine in engines:
                engine.close()
    first = found["vLLM"]
    rows = []
    for name, rates in found.items():
        ratios = sorted(rate / other for rate, other in zip(rates, first, strict=True))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        rows.append([name, round(statistics.median(rates)), f"{statistics.median(ratios):.3f}", spread])
    table = {
        "title": f"{SESSIONS} base sessions on a model of 200 M parameters, nothing of xloom used",
        "columns": ["engine", "tokens/s", "of vLLM alone", "by rounds"],
        "rows": rows,
        "notes": f"Medians of {arguments.rounds} rounds, engines in turn.",
    }
    if arguments.json:
        result = {"name": "unused", "machine": machine(), "tables": [table], "raw": found}
        arguments.json.write_text(json.dumps(result, indent=1))
    for row in [table["columns"], *rows]:
        print(" | ".join(str(cell) for cell in row))


if __name__ == "__main__":
    main()
