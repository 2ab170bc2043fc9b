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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle, prepare_lora
from xloom.protocol import NO_OVERRIDES, Overrides
from xloom.settings import SAMPLE

from .machine import machine

ROOT = Path(__file__).parents[1]
EXPERTS, RANK = 4, 16
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
console = Console(stderr=True)


def write_model(folder: Path) -> Path:
    """A Mistral configuration; vLLM fills in random weights (`load_format: dummy`)."""
    folder.mkdir()
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "head_dim": SHAPE["hidden_size"] // SHAPE["num_attention_heads"],
    }
    (folder / "config.json").write_text(json.dumps(config | SHAPE))
    return folder


def write_adapter(folder: Path, linears: dict[str, tuple[int, int]], rank: int) -> Path:
    """A random adapter on all of the decoder's linears."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (out, width) in linears.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width) / width**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return folder


def write_bundle(folder: Path, linears: dict[str, tuple[int, int]]) -> Path:
    """A random X-LoRA bundle with gates for each linear."""
    for number in range(EXPERTS):
        write_adapter(folder / str(number), linears, RANK)
    outputs, hidden = EXPERTS * len(linears), SHAPE["hidden_size"]
    key = "base_model.internal_xlora_classifier.layers.0"
    tensors = {f"{key}.weight": torch.randn(outputs, hidden) / hidden**0.5, f"{key}.bias": torch.randn(outputs)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": hidden, "xlora_depth": 1,
        "adapters": {str(number): str(number) for number in range(EXPERTS)}, "layerwise_scalings": True,
        "enable_softmax": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def prepared(bundle: Path, adapter: Path, model: Path, out: Path) -> dict[str, tuple[str, str]]:
    """What replicas load, by name: kind and folder. The plain adapter is of the mixtures' rank."""
    linears = linear_modules(str(model))
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    for name, overrides in {"mixture": NO_OVERRIDES, "single": Overrides(routing_passes=1)}.items():
        prepare_bundle(
            bundle, linears, out / name, hidden_size=hidden, max_rank=256, root=bundle.parent, overrides=overrides
        )
    prepare_lora(adapter, linears, out / "adapter", max_rank=256)
    return {
        "mixture": ("xlora", str(out / "mixture")),
        "single": ("xlora", str(out / "single")),
        "adapter": ("lora", str(out / "adapter")),
    }


def as_before(adapters: dict[str, tuple[str, str]], out: Path) -> dict[str, tuple[str, str]]:
    """The same for a version that does not know of routing in one pass."""
    found = {name: given for name, given in adapters.items() if name != "single"}
    kind, folder = found["mixture"]
    shutil.copytree(folder, out)
    description = json.loads((out / "xlora.json").read_text())
    for key in ("routing_passes", "prefill"):
        del description["routing"][key]
    (out / "xlora.json").write_text(json.dumps(description))
    return found | {"mixture": (kind, str(out))}


class Engine:
    """A process of `benchmarks.rows_engine`, with the package from one folder."""

    def __init__(self, name: str, package: Path, options: dict[str, Any]) -> None:
        self.name, self.adapters = name, options["adapters"]
        path = os.pathsep.join([str(package), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rows_engine", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        self.pages = self._answer()["pages"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("rows:"):
                answer: dict[str, Any] = json.loads(line.removeprefix("rows:"))
                return answer
        raise RuntimeError(f"the engine {self.name} has ended")

    def run(self, **job: Any) -> dict[str, float]:
        """One burst of requests."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


Found = dict[str, dict[str, dict[str, list[float]]]]  # engine -> case -> figure -> one value a round


class Case(NamedTuple):
    """A burst, by kind of request, and the one it is held against, which runs right before it."""

    kinds: dict[str, int]
    against: dict[str, int]


def measure(engines: list[Engine], cases: dict[str, Case], rounds: int, *, prompt: int, new: int, label: str) -> Found:
    """Each case, with the figures of what it is held against kept beside its own as `against: FIGURE`."""
    found: Found = {engine.name: {} for engine in engines}
    seeds = itertools.count()  # each burst has prompts of its own: none finds another's in the prefix cache
    for turn in track(range(-1, rounds), label, console=console):
        for case, (kinds, against) in cases.items():
            for engine in engines if turn % 2 else reversed(engines):
                if not {*kinds} - {"base"} <= {*engine.adapters}:
                    continue
                count = new if turn >= 0 else 8
                alone = engine.run(kinds=against, prompt=prompt, new=count, seed=next(seeds))
                answer = engine.run(kinds=kinds, prompt=prompt, new=count, seed=next(seeds))
                if turn < 0:
                    continue
                figures = found[engine.name].setdefault(case, {})
                for figure, value in answer.items():
                    figures.setdefault(figure, []).append(value)
                for figure, value in alone.items():
                    figures.setdefault(f"against: {figure}", []).append(value)
    return found


def cases_of(total: int) -> dict[str, Case]:
    """Each kind alone, and base rows beside 1 and 4 of the mixture."""
    base = {"base": total}
    return {
        "adapter": Case({"adapter": total}, base),
        "mixture": Case({"mixture": total}, base),
        "base beside 1": Case({"base": total - 1, "mixture": 1}, base),
        "base beside 4": Case({"base": total - 4, "mixture": 4}, base),
        "single": Case({"single": total}, {"adapter": total}),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.rows --before ../xloom-0.1/deployments --json rows.json",
    )
    parser.add_argument("--before", type=Path, help="the package's folder in another version's tree")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each case (%(default)s)")
    parser.add_argument("--only", choices=["large", "sample"], help="one of the two models")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    packages = {"now": ROOT / "deployments"} | ({"before": arguments.before} if arguments.before else {})
    tables, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for which in ("large", "sample"):
            if arguments.only not in (None, which):
                continue
            if which == "large":
                model = write_model(work / "model")
                linears = {name: size for name, size in linear_modules(str(model)).items() if name != "lm_head"}
                bundle = write_bundle(work / "bundle", linears)
                adapter = write_adapter(work / "one", linears, EXPERTS * RANK)
                total, new, vocabulary = 16, 40, SHAPE["vocab_size"]
                extra = {"load_format": "dummy", "skip_tokenizer_init": True}
            else:
                model, bundle, adapter = SAMPLE / "base", SAMPLE / "blend", SAMPLE / "adapters" / "code"
                total, new, vocabulary, extra = 48, 96, 4000, {}
            (work / which).mkdir()
            adapters = prepared(bundle, adapter, model, work / which)
            options = {
                "model": str(model), "xlora": True, "rank": EXPERTS * RANK, "vocabulary": vocabulary,
                "adapters": adapters,
                "engine": {
                    "dtype": "float32", "max_num_seqs": 64, "max_model_len": 1024, "max_adapters": 4,
                    "extra_args": extra,
                },
            }  # fmt: skip
            before = options | {"adapters": as_before(adapters, work / which / "before")}
            engines = [
                Engine(name, package, before if name == "before" else options) for name, package in packages.items()
            ]
            cases = cases_of(total)
            try:
                found = measure(engines, cases, arguments.rounds, prompt=32, new=new, label=which)
            finally:
                for engine in engines:
                    engine.close()
            title = "a model of 200 M parameters" if which == "large" else "the sample"
            tables.append(table(f"Rows of a mixture, {total} sessions on {title}", found, cases, arguments.rounds))
            raw[which] = found
    result = {"name": "rows", "machine": machine(), "tables": tables, "raw": raw}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    for each in tables:
        print(f"\n{each['title']}")
        for row in [each["columns"], *each["rows"]]:
            print(" | ".join(str(cell) for cell in row))


if __name__ == "__main__":
    main()
