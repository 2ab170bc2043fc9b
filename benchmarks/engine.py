"""X-LoRA against the base model and against PEFT, and the cost of routing, in one run on one machine.

Each engine setting (compiled, eager) starts one engine that serves base and X-LoRA alike; rounds alternate
between the two, and medians are compared. Output is tokens a second over whole requests, prompts included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.protocol import AdapterRef, TokenRequest
from xloom.settings import SAMPLE, EngineSettings, ModelSettings
from xloom.vllm.engine.backend import VLLMBackend

from .machine import machine

PROMPT_TOKENS, VOCABULARY = 32, 4000
console = Console(stderr=True)


@dataclass(frozen=True)
class Load:
    """How many requests at once, and how many tokens each makes."""

    concurrent: int
    new_tokens: int


LOADS = (Load(1, 96), Load(16, 128), Load(64, 128))


class Driver:
    """Sends requests to one engine and waits for them all."""

    def __init__(self, backend: VLLMBackend) -> None:
        self.backend = backend
        self._left: set[str] = set()
        self._done = asyncio.Event()
        self._count = 0
        self._pump = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for step in self.backend.steps():
            for chunk in step:
                if chunk.finish_reason is not None:
                    self._left.discard(chunk.request_id)
            if not self._left:
                self._done.set()

    async def run(self, load: Load, adapter: AdapterRef | None, rng: random.Random) -> float:
        """Output tokens a second of one burst of `load.concurrent` requests."""
        sampling = {"temperature": 0.0, "max_tokens": load.new_tokens, "ignore_eos": True}
        requests = []
        for _ in range(load.concurrent):
            self._count += 1
            prompt = [rng.randrange(5, VOCABULARY) for _ in range(PROMPT_TOKENS)]
            requests.append(TokenRequest(f"bench-{self._count}", prompt, sampling, adapter))
        self._left = {request.request_id for request in requests}
        self._done.clear()
        start = time.perf_counter()
        for request in requests:
            await self.backend.submit(request)
        await self._done.wait()
        return load.concurrent * load.new_tokens / (time.perf_counter() - start)

    async def close(self) -> None:
        self._pump.cancel()
        await self.backend.close()


async def measure_engine(
    sample: Path, prepared: Path, rank: int, compiled: bool, rounds: int
) -> dict[str, list[float]]:
    """Tokens a second, one a round, keyed `kind/concurrent`, of one engine that serves both kinds."""
    settings = EngineSettings(dtype="float32", compile=compiled, max_num_seqs=64)
    backend = await VLLMBackend.load(
        ModelSettings(source=str(sample / "base")), settings, xlora=True, max_lora_rank=rank
    )
    blend = AdapterRef("blend", "bench", "xlora")
    await backend.add_adapter(blend, prepared)
    driver, rng = Driver(backend), random.Random(0)
    found: dict[str, list[float]] = {}
    name = "compiled" if compiled else "eager"
    try:
        for load in LOADS:  # once for nothing: caches, lazy compilation
            for adapter in (None, blend):
                await driver.run(Load(load.concurrent, 16), adapter, rng)
        for _ in track(range(rounds), f"engine, {name}", console=console):
            for load in LOADS:
                for kind, adapter in (("base", None), ("xlora", blend)):
                    rate = await driver.run(load, adapter, rng)
                    found.setdefault(f"{kind}/{load.concurrent}", []).append(rate)
    finally:
        await driver.close()
    return found


def measure_peft(sample: Path, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of PEFT's own X-LoRA `generate`, keyed `peft/concurrent`."""
    import torch

    from xloom.sample.evaluate import load_xlora

    model, _ = load_xlora(sample)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for concurrent, new_tokens in ((1, 96), (16, 128)):
        for _ in track(range(rounds), f"PEFT generate, {concurrent}", console=console):
            prompts = torch.randint(5, VOCABULARY, (concurrent, PROMPT_TOKENS), generator=generator)
            start = time.perf_counter()
            with torch.no_grad():
                out = model.generate(
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                )
            made = out.numel() - prompts.numel()
            found.setdefault(f"peft/{concurrent}", []).append(made / (time.perf_counter() - start))
    return found


def measure_routing(prepared: Path, repeats: int = 200) -> dict[int, tuple[float, float]]:
    """Milliseconds (median, 90th percentile) from hidden states to the gates the kernels read, by tokens a step."""
    import torch

    from xloom.mixtures.routing.registry import load_routing
    from xloom.mixtures.routing.xlora import XLoraRouting
    from xloom.vllm.plugin.gates import BATCH, SlotRouting, SlotRows

    router = load_routing(prepared)
    assert isinstance(router, XLoraRouting)
    routing = SlotRouting(router)
    BATCH.linears = {number: [name] for number, name in enumerate(router.modules)}
    found = {}
    for tokens in (1, 16, 64, 256):
        hidden = torch.randn(tokens, router.hidden_size)
        entry = SlotRows(1, 0, slice(0, tokens), {}, routing)
        times = []
        with torch.inference_mode():
            for _ in range(repeats):
                start = time.perf_counter()
                entry.set_gates(router.gates(hidden))
                times.append(1e3 * (time.perf_counter() - start))
        times.sort()
        found[tokens] = (statistics.median(times), times[int(0.9 * len(times))])
    return found


def tables(
    rounds: int,
    engines: dict[str, dict[str, list[float]]],
    peft: dict[str, list[float]],
    routing: dict[int, tuple[float, float]],
) -> list[dict[str, Any]]:
    """The result as the tables of the report."""

    def median(values: list[float]) -> float:
        return statistics.median(values)

    best = {key: max(median(found[key]) for found in engines.values()) for key in next(iter(engines.values()))}
    speed = [
        [
            load.concurrent,
            *(
                round(median(found[f"{kind}/{load.concurrent}"]))
                for found in engines.values()
                for kind in ("base", "xlora")
            ),
            f"{best[f'xlora/{load.concurrent}'] / best[f'base/{load.concurrent}']:.2f}",
        ]
        for load in LOADS
    ]
    columns = [
        "concurrent",
        *(f"{kind}, {name}" for name in engines for kind in ("base", "X-LoRA")),
        "X-LoRA ÷ base, each at its best",
    ]
    against_peft = [
        [
            c,
            round(median(peft[f"peft/{c}"]), 1),
            round(best[f"xlora/{c}"]),
            f"{best[f'xlora/{c}'] / median(peft[f'peft/{c}']):.0f}×",
        ]
        for c in (1, 16)
    ]
    return [
        {
            "title": "X-LoRA against the base model in one engine (tokens/s)",
            "columns": columns,
            "rows": speed,
            "notes": f"Medians of {rounds} alternating rounds. "
            "A mixture's token is two rows, in two steps: 0.5 is the limit where the model is all there is to do.",
        },
        {
            "title": "X-LoRA against PEFT's generate (tokens/s)",
            "columns": ["concurrent", "PEFT", "xloom", "xloom ÷ PEFT"],
            "rows": against_peft,
            "notes": "Float32, the same weights and cores; PEFT recomputes the whole sequence for each token.",
        },
        {
            "title": "Routing decision per step: classifier, softmax, gates widened to ranks (ms)",
            "columns": ["tokens in the step", "median", "90th percentile"],
            "rows": [[tokens, f"{mid:.3f}", f"{high:.3f}"] for tokens, (mid, high) in routing.items()],
            "notes": "",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m benchmarks.engine --json engine.json"
    )
    parser.add_argument(
        "--sample", type=Path, default=SAMPLE, help="folder with base/, adapters/, blend/ (the shipped one)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each engine (%(default)s)")
    parser.add_argument("--peft-rounds", type=int, default=3, help="rounds of PEFT (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    sample: Path = arguments.sample
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "blend"
        hidden = json.loads((sample / "base" / "config.json").read_text())["hidden_size"]
        modules = linear_modules(str(sample / "base"))
        made = prepare_bundle(
            sample / "blend", modules, prepared, hidden_size=hidden,
            max_rank=256,
        )  # fmt: skip
        routing = measure_routing(prepared)
        peft = measure_peft(sample, arguments.peft_rounds)
        engines = {
            name: asyncio.run(measure_engine(sample, prepared, made.rank, compiled, arguments.rounds))
            for name, compiled in (("compiled", True), ("eager", False))
        }
    result = {
        "name": "engine",
        "machine": machine(),
        "tables": tables(arguments.rounds, engines, peft, routing),
        "raw": {"engines": engines, "peft": peft},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    for table in result["tables"]:
        print(f"\n{table['title']}")
        for row in [table["columns"], *table["rows"]]:
            print(" | ".join(str(cell) for cell in row))


if __name__ == "__main__":
    main()
