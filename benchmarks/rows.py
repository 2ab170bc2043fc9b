"""What a mixture costs: its own speed, and what the rows beside it lose; two versions of xloom can take turns.

A model of random weights whose forward pass is most of a step (about 200 M parameters), and the sample, where a step
costs more than its pass. Engines are up side by side and measured in turn, round by round; medians are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.protocol import NO_OVERRIDES, Blend, Overrides
from xloom.settings import SAMPLE

from .machine import machine
from .random_models import EXPERTS, LARGE, RANK, SEVEN_B, Shape, write_adapter, write_bundle, write_model

ROOT = Path(__file__).parents[1]
ROUTINGS = ("fixed", "arrow")
Adapters = dict[str, tuple[str, str]]  # name -> kind, prepared folder
console = Console(stderr=True)


def prepared(bundle: Path, mixed: dict[str, Path], adapter: Path, model: Path, out: Path) -> Adapters:
    """What replicas load, by name: kind and folder. The plain adapter is of the mixtures' rank.

    `mixed` are the bundle's adapters, for the kinds of mixture without a classifier.
    """
    linears = linear_modules(str(model))
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    for name, overrides in {"mixture": NO_OVERRIDES, "single": Overrides(routing_passes=1)}.items():
        prepare_bundle(
            bundle, linears, out / name, hidden_size=hidden, max_rank=256, root=bundle.parent, overrides=overrides
        )
    for routing in ROUTINGS:
        prepare_mixture(Blend(routing, {}), mixed, linears, out / routing, max_rank=256)
    prepare_lora(adapter, linears, out / "adapter", max_rank=256)
    return {
        **{routing: (routing, str(out / routing)) for routing in ROUTINGS},
        "mixture": ("xlora", str(out / "mixture")),
        "single": ("xlora", str(out / "single")),
        "adapter": ("lora", str(out / "adapter")),
    }


def as_before(adapters: Adapters, out: Path) -> Adapters:
    """The same for a version that knows neither of routing in one pass nor of other kinds."""
    found = {name: given for name, given in adapters.items() if name not in ("single", *ROUTINGS)}
    kind, folder = found["mixture"]
    shutil.copytree(folder, out)
    description = json.loads((out / "xlora.json").read_text())
    for key in ("routing_passes", "prefill"):
        del description["routing"][key]
    (out / "xlora.json").write_text(json.dumps(description))
    return found | {"mixture": (kind, str(out))}


class Engine:
    """A process of `benchmarks.rows_engine`, with the package from one folder."""

    def __init__(self, name: str, package: Path, options: dict[str, Any], environment: dict[str, str]) -> None:
        self.name, self.adapters = name, {}
        path = os.pathsep.join([str(package), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rows_engine", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | environment,
            text=True,
        )

    def give(self, adapters: Adapters) -> None:
        """What it is to serve; it may still be loading its model."""
        self.adapters = adapters
        self._say(adapters)

    def wait(self) -> None:
        """Until it is ready, with the adapters it was given."""
        self._answer()

    def _say(self, line: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("rows:"):
                answer: dict[str, Any] = json.loads(line.removeprefix("rows:"))
                return answer
        raise RuntimeError(f"the engine {self.name} has ended")

    def run(self, **job: Any) -> dict[str, float]:
        """One burst of requests."""
        self._say(job)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@dataclass(frozen=True)
class Scenario:
    """A model, and the load it is measured under."""

    title: str
    shape: Shape | None  # None: the sample
    sessions: int
    prompt: int  # tokens, as is `new`
    new: int
    engine: dict[str, Any]  # settings
    single_stream: bool = False  # measured too


PLAIN, BEFORE = "vLLM with LoRA", "before"
RANDOM = {"load_format": "dummy", "skip_tokenizer_init": True}
SCENARIOS = {
    "large": Scenario("a model of 200 M parameters", LARGE, 16, 32, 40, {"dtype": "float32", "extra_args": RANDOM}),
    "sample": Scenario("the sample", None, 48, 32, 96, {"dtype": "float32"}),
    # Three engines share the GPU: the share is what vLLM wants free when it starts, the pages are given.
    "gpu": Scenario(
        "a model of Mistral 7B's shape, on a GPU",
        SEVEN_B,
        32,
        128,
        64,
        {
            "dtype": "bfloat16",
            "paged_attention": {"gpu_memory_fraction": 0.27},
            "extra_args": RANDOM | {"kv_cache_memory_bytes": 3 << 30},
        },
        single_stream=True,
    ),
}


Found = dict[str, dict[str, dict[str, list[float]]]]  # engine -> case -> figure -> one value a round


class Case(NamedTuple):
    """A burst, by kind of request, and the one it is held against, which runs right before it."""

    kinds: dict[str, int]
    against: dict[str, int]


def measure(engines: list[Engine], cases: dict[str, Case], turn: int, scenario: Scenario, found: Found) -> None:
    """One round of all cases; what each is held against is kept beside its own as `against: FIGURE`. -1: unmeasured."""
    seeds = itertools.count(1_000_000 * turn)  # prompts of its own for each burst: none finds another's cached
    for case, (kinds, against) in cases.items():
        for engine in engines if turn % 2 else reversed(engines):
            if not {*kinds} - {"base"} <= {*engine.adapters}:
                continue
            burst = {"prompt": scenario.prompt, "new": scenario.new if turn >= 0 else 8}
            alone = engine.run(kinds=against, seed=next(seeds), **burst)
            answer = engine.run(kinds=kinds, seed=next(seeds), **burst)
            if turn < 0:
                continue
            figures = found.setdefault(engine.name, {}).setdefault(case, {})
            for figure, value in answer.items():
                figures.setdefault(figure, []).append(value)
            for figure, value in alone.items():
                figures.setdefault(f"against: {figure}", []).append(value)


def cases_of(scenario: Scenario) -> dict[str, Case]:
    """Each kind alone, and base rows beside 1 and 4 of the mixture."""
    total = scenario.sessions
    base = {"base": total}
    cases = {
        "adapter": Case({"adapter": total}, base),
        "mixture": Case({"mixture": total}, base),
        "base beside 1": Case({"base": total - 1, "mixture": 1}, base),
        "base beside 4": Case({"base": total - 4, "mixture": 4}, base),
        "single": Case({"single": total}, {"adapter": total}),
        **{routing: Case({routing: total}, {"adapter": total}) for routing in ROUTINGS},
    }
    if scenario.single_stream:
        cases["adapter, 1 session"] = Case({"adapter": 1}, {"base": 1})
        cases["mixture, 1 session"] = Case({"mixture": 1}, {"base": 1})
    return cases


def table(title: str, found: Found, cases: dict[str, Case], rounds: int) -> dict[str, Any]:
    """A row a case: tokens/s, and against what ran in the same engine just before."""
    rows = []
    for name, measured in found.items():
        for case, figures in measured.items():
            kind, [other] = next(iter(cases[case].kinds)), cases[case].against

            def ratio(figure: str, against: str, of: dict[str, list[float]] = figures) -> str:
                pairs = zip(of[figure], of[f"against: {against}"], strict=True)
                return f"{statistics.median(one / other for one, other in pairs):.2f}"

            rows.append(
                [
                    name,
                    case,
                    f"{other}: {statistics.median(figures['against: all']):,.0f}",
                    round(statistics.median(figures["all"])),
                    ratio("all", "all"),
                    ratio(f"row {kind}", f"row {other}"),
                    round(statistics.median(figures[f"first {kind}"])),
                    ratio(f"first {kind}", f"first {other}"),
                ]
            )
    columns = [
        "version", "case", "against, tokens/s", "tokens/s", "ratio", "a row's decoding, ratio", "first token (ms)",
        "ratio",
    ]  # fmt: skip
    notes = f"Medians of {rounds} rounds, engines in turn, each case right after what it is held against."
    return {"title": title, "columns": columns, "rows": rows, "notes": notes}


def engines_of(which: str, model: Path, arguments: argparse.Namespace, work: Path) -> list[Engine]:
    """The engines that take turns, loading."""
    scenario = SCENARIOS[which]
    engine = {"max_num_seqs": 64, "max_model_len": 1024, "max_adapters": 6} | scenario.engine
    vocabulary = (scenario.shape or {"vocab_size": 4000})["vocab_size"]
    options = {"model": str(model), "xlora": True, "rank": EXPERTS * RANK, "vocabulary": vocabulary, "engine": engine}
    here = ROOT / "deployments"
    engines = [Engine("now", here, options, {})]
    if which == "gpu":
        untuned = work / "untuned"
        untuned.mkdir()
        engines.append(Engine(PLAIN, here, options | {"xlora": False}, {"VLLM_TUNED_CONFIG_FOLDER": str(untuned)}))
    if arguments.kernels:
        engines.append(Engine("now, tuned here", here, options, {"VLLM_TUNED_CONFIG_FOLDER": str(arguments.kernels)}))
    if arguments.before:
        engines.append(Engine(BEFORE, arguments.before, options, {}))
    return engines


def make_ready(engines: list[Engine], adapters: Adapters, old: Path) -> None:
    """Give each engine what it serves, and wait for all."""
    for each in engines:
        if each.name == PLAIN:
            each.give({"adapter": adapters["adapter"]})
        else:
            each.give(as_before(adapters, old) if each.name == BEFORE else adapters)
    for each in engines:
        each.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.rows --before ../xloom-0.1/deployments --json rows.json",
    )
    parser.add_argument("--before", type=Path, help="the package's folder in another version's tree")
    parser.add_argument("--kernels", type=Path, help="on a GPU: a folder of `xloom tune --out`, for an engine more")
    parser.add_argument("--sessions", type=int, help="requests at once (default: the scenario's)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case (%(default)s)")
    parser.add_argument("--only", choices=[*SCENARIOS], help="one of them (default: those for CPU)")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case alone; may be repeated")
    parser.add_argument("--json", type=Path, help="write the result here, after each round too")
    arguments = parser.parse_args()
    tables, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for which in [arguments.only] if arguments.only else ["large", "sample"]:
            scenario = replace(SCENARIOS[which], sessions=arguments.sessions or SCENARIOS[which].sessions)
            (work / which).mkdir()
            model, bundle, rank = SAMPLE / "base", SAMPLE / "blend", RANK
            mixed = {folder.name: folder for folder in sorted((SAMPLE / "adapters").iterdir())}
            if scenario.shape:
                model = write_model(work / "model", scenario.shape)
            engines = engines_of(which, model, arguments, work)
            every = cases_of(scenario)
            cases = {name: case for name, case in every.items() if name in (arguments.case or every)}
            raw[which] = found = {}
            try:
                linears = {name: size for name, size in linear_modules(str(model)).items() if name != "lm_head"}
                if scenario.shape:
                    bundle = write_bundle(work / "bundle", linears, scenario.shape["hidden_size"])
                    mixed = {f"adapter{number}": bundle / str(number) for number in range(EXPERTS)}
                else:
                    rank = json.loads((mixed["code"] / "adapter_config.json").read_text())["r"]
                adapter = write_adapter(work / f"one-{which}", linears, len(mixed) * rank)
                make_ready(engines, prepared(bundle, mixed, adapter, model, work / which), work / which / "before")
                for turn in track(range(-1, arguments.rounds), which, console=console):
                    measure(engines, cases, turn, scenario, found)
                    if arguments.json:
                        arguments.json.write_text(json.dumps({"name": "rows", "machine": machine(), "raw": raw}))
            finally:
                for engine in engines:
                    engine.close()
            title = f"Rows of a mixture, {scenario.sessions} sessions on {scenario.title}"
            tables.append(table(title, found, cases, arguments.rounds))
    result = {"name": "rows", "machine": machine(), "tables": tables, "raw": raw}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    for each in tables:
        print(f"\n{each['title']}")
        for row in [each["columns"], *each["rows"]]:
            print(" | ".join(str(cell) for cell in row))


if __name__ == "__main__":
    main()
