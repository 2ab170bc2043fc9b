"""Every way of quantising that works on CPU, on the sample: size, time, held-out perplexity, and speed in vLLM.

Each case is made anew in a cache of its own. Speed is the base model's alone, in bfloat16. The engine on the plain
weights stays up all the while; each case's takes turns with it, round by round, and the median of the rounds' ratios
is the case's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from xloom.quantization.evaluation import held_out_windows, model_perplexity
from xloom.quantization.model_cache import read_done
from xloom.quantization.quantise import plan, quantised_folder
from xloom.quantization.recipes import BITS, METHODS, cases
from xloom.quantization.source import plain_model
from xloom.settings import SAMPLE, EngineSettings, IsqSettings, ModelSettings
from xloom.vllm.engine.backend import VLLMBackend

from .engine import Driver, Load
from .machine import machine

# ADR-008's own table: memory reduction and quality loss.
ADR = {
    ("awq", 4): ("4×", "< 1%"),
    ("gptq", 4): ("4×", "< 1%"),
    ("rtn", 4): ("4×", "2–3%"),
    ("awq", 2): ("8×", "3–5%"),
}
CASES = [(method, bits) for method in METHODS for bits in sorted(BITS, reverse=True) if (method, bits) in cases("cpu")]
LOADS = (Load(1, 64), Load(16, 64))
console = Console(stderr=True)

Speeds = dict[int, float]  # concurrent requests -> tokens a second as a share of the plain engine's


def quantise(model: ModelSettings, isq: IsqSettings, windows: list[list[int]]) -> dict[str, Any]:
    """Make one case and judge it."""
    settled = plan(plain_model(model), isq, "cpu")
    folder = quantised_folder(settled, isq, "cpu")
    return {"folder": str(folder), "perplexity": model_perplexity(folder, windows), **read_done(folder)}


async def engine(folder: str, compiled: bool) -> Driver:
    """An engine on a folder, warm."""
    settings = EngineSettings(dtype="bfloat16", compile=compiled, max_num_seqs=16, max_model_len=512)
    backend = await VLLMBackend.load(ModelSettings(source=folder), settings, xlora=False, max_lora_rank=16)
    driver, rng = Driver(backend), random.Random(0)
    for load in LOADS:
        await driver.run(load, None, rng)
    return driver


async def compare_speed(plain: Driver, folder: str, rounds: int, compiled: bool) -> Speeds:
    """Both engines under the same loads in turn: the quantised one's tokens a second by the plain one's."""
    quantised, ratios = await engine(folder, compiled), []
    try:
        for number in range(rounds):
            took = {}
            for driver in (plain, quantised) if number % 2 else (quantised, plain):
                rng = random.Random(number)
                took[driver] = {load.concurrent: await driver.run(load, None, rng) for load in LOADS}
            ratios.append({load: took[quantised][load] / took[plain][load] for load in took[plain]})
    finally:
        await quantised.close()
    return {load.concurrent: statistics.median(each[load.concurrent] for each in ratios) for load in LOADS}


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    model = ModelSettings(source=str(arguments.model))
    windows = held_out_windows(arguments.model, arguments.calibration, arguments.windows)
    found: dict[str, Any] = {"plain": {"perplexity": model_perplexity(arguments.model, windows)}, "cases": []}
    console.print(f"plain: perplexity {found['plain']['perplexity']:.4f}")
    plain = await engine(str(arguments.model), arguments.compiled) if arguments.rounds else None
    with tempfile.TemporaryDirectory() as cache:
        for method, bits in arguments.cases or CASES:
            isq = IsqSettings(
                method=method,
                bits=bits,
                cache=cache,
                group_size=arguments.group_size,
                calibration=arguments.calibration,
                calibration_samples=arguments.samples,
            )
            made = await asyncio.to_thread(quantise, model, isq, windows)
            made["speed"] = (
                await compare_speed(plain, made["folder"], arguments.rounds, arguments.compiled) if plain else {}
            )
            found["cases"].append(made)
            size = made["linear_bytes"][1] / made["linear_bytes"][0]
            console.print(
                f"{method} at {bits} bits: {made['seconds']} s, linears {size:.3f}, "
                f"perplexity {made['perplexity']:.4f}, tokens/s ÷ plain {made['speed']}"
            )
    if plain is not None:
        await plain.close()
    return found


def tables(found: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The result as the tables of the report."""
    plain = found["plain"]
    rows = []
    for made in found["cases"]:
        recipe = made["recipe"]
        adr_size, adr_loss = ADR.get((recipe["method"], recipe["bits"]), ("", ""))
        linears, total = (made[key][0] / made[key][1] for key in ("linear_bytes", "weight_bytes"))
        rows.append(
            [
                recipe["method"],
                recipe["bits"],
                recipe["scheme"],
                f"{linears:.1f}×",
                adr_size,
                f"{total:.1f}×",
                f"{made['perplexity'] / plain['perplexity'] - 1:+.2%}",
                adr_loss,
                f"{made['seconds']:.0f}",
                *(f"{ratio:.2f}" for ratio in made["speed"].values()),
            ]
        )
    columns = ["method", "bits", "scheme", "linears smaller", "ADR-008", "checkpoint smaller", "perplexity", "ADR-008"]
    columns.append("seconds")
    columns += [f"tokens/s ÷ bf16, {load} at once" for load in found["cases"][0]["speed"]]
    mode = "compiled" if arguments.compiled else "eager"
    return [
        {
            "title": "Quantised on CPU: size, held-out perplexity, time, speed",
            "columns": columns,
            "rows": rows,
            "notes": f"Plain perplexity {plain['perplexity']:.3f} over {arguments.windows} windows of 512 tokens; "
            f"calibration on {arguments.samples}, group size {arguments.group_size}. Seconds are of the whole step, "
            f"imports included. Speed: medians of {arguments.rounds} rounds in turn, engines {mode}.",
        }
    ]


def method_and_bits(text: str) -> tuple[str, int]:
    """`awq:4` as a case that works on CPU."""
    method, _, bits = text.partition(":")
    if (method, int(bits)) not in CASES:
        raise ValueError(text)
    return method, int(bits)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantisation",
        description=__doc__,
        epilog="example: python -m benchmarks.quantisation --json quantisation.json",
    )
    parser.add_argument("--model", type=Path, default=SAMPLE / "base", help="folder of the plain model (the sample's)")
    parser.add_argument("--calibration", default="sample", help="text, as isq.calibration (%(default)s)")
    parser.add_argument("--cases", nargs="+", type=method_and_bits, metavar="METHOD:BITS", help="(default: all)")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration (%(default)s)")
    parser.add_argument("--group-size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 512 tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each load an engine; 0: no engines (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compiled engines instead of eager: slower to start")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments))
    result = {"name": "quantisation", "machine": machine(), "tables": tables(found, arguments), "raw": found}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    for table in result["tables"]:
        print(f"\n{table['title']}")
        for row in [table["columns"], *table["rows"]]:
            print(" | ".join(str(cell) for cell in row))
        print(table["notes"])


if __name__ == "__main__":
    main()
