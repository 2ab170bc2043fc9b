"""Every way of quantising that works on CPU, on the sample: size, time, held-out perplexity, and speed in vLLM.

Each case is made anew in a cache of its own. Speed is one engine's at a time, in bfloat16, base model alone; the
unquantised engine is measured before and after the others, and its mean is what they are compared with.
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

from xloom.engines.vllm import VLLMBackend
from xloom.quantization.cache import read_done
from xloom.quantization.evaluation import held_out_windows, model_perplexity
from xloom.quantization.quantise import plan, quantised_folder
from xloom.quantization.recipes import BITS, METHODS, cases
from xloom.quantization.source import plain_model
from xloom.settings import SAMPLE, EngineSettings, IsqSettings, ModelSettings

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

Speeds = dict[int, float]  # concurrent requests -> tokens a second


def quantise(model: ModelSettings, isq: IsqSettings, windows: list[list[int]]) -> dict[str, Any]:
    """Make one case and judge it."""
    settled = plan(plain_model(model), isq, "cpu")
    folder = quantised_folder(settled, isq, "cpu")
    return {"folder": str(folder), "perplexity": model_perplexity(folder, windows), **read_done(folder)}


async def speed(folder: str, rounds: int, compiled: bool) -> Speeds:
    """Median tokens a second of one engine on a folder."""
    settings = EngineSettings(dtype="bfloat16", compile=compiled, max_num_seqs=16, max_model_len=512)
    backend = await VLLMBackend.load(ModelSettings(source=folder), settings, xlora=False, max_lora_rank=16)
    driver, rng = Driver(backend), random.Random(0)
    try:
        for load in LOADS:
            await driver.run(Load(load.concurrent, 8), None, rng)
        return {
            load.concurrent: statistics.median([await driver.run(load, None, rng) for _ in range(rounds)])
            for load in LOADS
        }
    finally:
        await driver.close()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    model = ModelSettings(source=str(arguments.model))
    windows = held_out_windows(arguments.model, arguments.calibration, arguments.windows)
    found: dict[str, Any] = {"plain": {"perplexity": model_perplexity(arguments.model, windows)}, "cases": []}

    def timed(folder: str) -> Speeds:
        return asyncio.run(speed(folder, arguments.rounds, arguments.compiled)) if arguments.rounds else {}

    with tempfile.TemporaryDirectory() as cache:
        before = timed(str(arguments.model))
        console.print(f"plain: perplexity {found['plain']['perplexity']:.4f}, tokens/s {before}")
        for method, bits in arguments.cases or CASES:
            isq = IsqSettings(
                method=method,
                bits=bits,
                cache=cache,
                group_size=arguments.group_size,
                calibration=arguments.calibration,
                calibration_samples=arguments.samples,
            )
            made = quantise(model, isq, windows)
            made["speed"] = timed(made["folder"])
            found["cases"].append(made)
            size = made["linear_bytes"][1] / made["linear_bytes"][0]
            console.print(
                f"{method} at {bits} bits: {made['seconds']} s, linears {size:.3f}, "
                f"perplexity {made['perplexity']:.4f}, tokens/s {made['speed']}"
            )
        after = timed(str(arguments.model))
    found["plain"]["speed"] = {load: (before[load] + after[load]) / 2 for load in before}
    found["plain"]["drift"] = {load: after[load] / before[load] for load in before}
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
                f"{made['perplexity'] / plain['perplexity'] - 1:+.1%}",
                adr_loss,
                f"{made['seconds']:.0f}",
                *(f"{made['speed'][load] / plain['speed'][load]:.2f}" for load in plain["speed"]),
            ]
        )
    columns = ["method", "bits", "scheme", "linears smaller", "ADR-008", "checkpoint smaller", "perplexity", "ADR-008"]
    columns.append("seconds")
    columns += [f"tokens/s ÷ bf16, {load} at once" for load in plain["speed"]]
    mode = "compiled" if arguments.compiled else "eager"
    drift = ", ".join(f"{load}: {ratio:.2f}" for load, ratio in plain["drift"].items())
    return [
        {
            "title": "Quantised on CPU: size, held-out perplexity, time, speed",
            "columns": columns,
            "rows": rows,
            "notes": f"Plain perplexity {plain['perplexity']:.3f} over {arguments.windows} windows of 512 tokens; "
            f"calibration on {arguments.samples}, group size {arguments.group_size}. Seconds are of the whole step, "
            f"imports included. Engines {mode}; the plain engine's last run ÷ its first, by load: {drift or '-'}.",
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
    parser.add_argument("--rounds", type=int, default=3, help="of each load an engine; 0: no engines (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compiled engines instead of eager: slower to start")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    found = measure(arguments)
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
