"""What `xloom compose` makes of the sample: perplexity and gates of each way to mix its adapters, over seeds.

A bundle's gates learned by a linear router, then tuned; and a linear router trained from the adapters alone. Text is
the sample's own, one document in sixteen held out; Arrow's top k and temperature are chosen on training text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from xloom.compose.composition import PIECE
from xloom.compose.course import CHOSEN_BY, Course
from xloom.compose.evaluation import agreement, chosen_arrow, figures, ways
from xloom.compose.learned import LearnedRouter
from xloom.compose.mixture import Mixture
from xloom.compose.model import load_base
from xloom.compose.options import Options
from xloom.compose.router import BundleRouter
from xloom.compose.teacher import Teacher
from xloom.compose.text import MIXED, Batches, Streams, held_out_rows, text_encoder
from xloom.compose.training import Told, train
from xloom.mixtures.base_weights import BaseWeights
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.stacking import stack_adapters
from xloom.sample.corpus import DOMAINS
from xloom.settings import SAMPLE, ModelSettings

from .machine import machine, machine_line

BASE = str(SAMPLE / "base")


def timed(work: Callable[[], None]) -> dict[str, float]:
    """Seconds that a training took: by the clock, and of processor time."""
    clock, processor = time.monotonic(), time.process_time()
    work()
    return {"seconds": time.monotonic() - clock, "processor_s": time.process_time() - processor}


def told(step: Told) -> None:
    """Now and then, how far a training is."""
    if step.step % 20 == 0:
        print(step, flush=True)


def measure(seeds: int, rows: int, options: Options, kept_at: Path | None = None) -> dict[str, Any]:
    """`fixed`: the ways without training and the bundle; `seeds`: for each what was trained came to.

    What is known after each seed is written to `kept_at`.
    """
    read = partial(
        Streams.read, dict.fromkeys(DOMAINS, "sample"), None, text_encoder(AutoTokenizer.from_pretrained(BASE))
    )
    training, kept = read(held_out=False, limit=1 << 19), read(held_out=True, limit=1 << 20)
    columns = held_out_rows(kept, rows, 2048, 0)
    modules = linear_modules(BASE)
    teacher = Teacher.read(SAMPLE / "blend", modules, 256, None, BaseWeights(BASE))
    mixture = Mixture(load_base(ModelSettings(source=BASE), "cpu"), stack_adapters(teacher.adapters, modules))
    bundle = teacher.router(torch.device("cpu"))
    chosen_by = Batches(training, options.batch, options.length, PIECE, 0).draw(CHOSEN_BY)[0]
    arrow = chosen_arrow(mixture, list(teacher.adapters.values()), chosen_by)
    fixed = figures(mixture, ways(mixture, arrow) | {"bundle": bundle}, columns)
    result: dict[str, Any] = {
        "machine": machine_line(machine()),
        "threads": torch.get_num_threads(),
        "fixed": {"perplexity": fixed.perplexity, "gates": fixed.gates},
        "arrow": {"top_k": arrow.top_k, "temperature": arrow.temperature},
        "seeds": [],
    }
    for seed in range(seeds):
        batches = Batches(training, options.batch, options.length, PIECE, seed)
        result["seeds"].append(one_seed(mixture, teacher, bundle, batches, columns, options))
        if kept_at:
            kept_at.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def one_seed(
    mixture: Mixture,
    teacher: Teacher,
    bundle: BundleRouter,
    batches: Batches,
    columns: dict[str, Tensor],
    options: Options,
) -> dict[str, Any]:
    """Fit the bundle's gates, tune, and train another router from the adapters alone."""
    found: dict[str, Any] = {}

    def look(name: str, router: LearnedRouter, took: dict[str, float]) -> None:
        judged = figures(mixture, {name: router}, columns)
        found[name] = took | {"perplexity": judged.perplexity[name], "gates": judged.gates[name]}
        print(name, {column: round(value, 2) for column, value in judged.perplexity[name].items()}, flush=True)

    learning, composing = (Course(mixture, each, batches, options) for each in (teacher, None))
    learner = learning.router()
    look("distilled", learner, timed(lambda: learning.begin(learner)))
    alike = agreement(mixture, bundle, learner, columns[MIXED])
    found["distilled"]["agreement"] = {"tokens": alike.tokens, "adapters": alike.adapters, "gates": alike.gates}
    look("tuned", learner, timed(lambda: train(learner, learning.training(learner), told=told)))
    composed = composing.router()
    composing.begin(composed)
    look("composed", composed, timed(lambda: train(composed, composing.training(composed), told=told)))
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The tables of docs/mixtures.md: means over the seeds, with their range on mixed rows."""
    columns = list(result["fixed"]["perplexity"]["base"])
    arrow = result["arrow"]
    names = {"arrow": f"Arrow, top {arrow['top_k']}, T {arrow['temperature']:g}", "bundle": "X-LoRA, the bundle"}
    lines = ["| perplexity on | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for way, values in result["fixed"]["perplexity"].items():
        cells = " | ".join(f"{values[column]:.2f}" for column in columns)
        lines.append(f"| {names.get(way, way)} | {cells} |")
    seeds = result["seeds"]
    for way in seeds[0]:
        cells = []
        for column in columns:
            values = [seed[way]["perplexity"][column] for seed in seeds]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if column == MIXED else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}")
        lines.append(f"| `linear`, {way} | " + " | ".join(cells) + " |")
    lines += ["", "| mean gates on | " + " | ".join(DOMAINS) + " |", "|---|" + "---|" * len(DOMAINS)]
    for way, by_column in (result["fixed"]["gates"] | {way: seeds[0][way]["gates"] for way in seeds[0]}).items():
        for column, gates in by_column.items():
            cells = " | ".join(f"{gates[name]:.2f}" for name in DOMAINS)
            lines.append(f"| {names.get(way, way)}, on {column} | {cells} |")
    for way in seeds[0]:
        clock, processor = ([seed[way][kind] for seed in seeds] for kind in ("seconds", "processor_s"))
        lines += ["", f"{way}: {max(clock):.0f} s at most by the clock, {max(processor):.0f} s of processor time."]
    alike = [seed["distilled"]["agreement"] for seed in seeds]
    means = {kind: sum(each[kind] for each in alike) / len(alike) for kind in alike[0]}
    lines.append(
        f"distilled, as the bundle on mixed rows: likeliest token {means['tokens']:.1%}, strongest adapter "
        f"{means['adapters']:.1%}, a gate off by {means['gates']:.3f}."
    )
    return "\n".join([*lines, "", result["machine"], f"{result['threads']} threads, {len(seeds)} seeds."])


def main() -> None:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m benchmarks.compose")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="held-out rows of 512 tokens a column (%(default)s)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of composing (%(default)s)")
    parser.add_argument("--tune", type=int, default=60, help="steps of tuning (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here, after each seed")
    arguments = parser.parse_args()
    options = Options(steps=arguments.steps, tune=arguments.tune, learning_rate=arguments.learning_rate)
    result = measure(arguments.seeds, arguments.rows, options, arguments.json)
    print(as_markdown(result))


if __name__ == "__main__":
    main()
