"""`xloom tune`: the LoRA kernels' configurations for this GPU and a model's shapes, measured, for engines to use."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.engines.registry import load_backend
from xloom.protocol import XloomError
from xloom.settings import Settings, load_settings

if TYPE_CHECKING:
    from xloom.vllm.engine.lora_timing import Best

SECONDS = 60.0


def add_parser(commands: Any) -> None:
    """The command's options."""
    text = (
        "Measure vLLM's LoRA kernels on this machine's GPU for a deployment's shapes, and keep the fastest "
        "configurations: engines on this machine use them from their next start."
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune", help=text, description=text, epilog="example: xloom tune settings.yaml --rank 64"
    )
    parser.add_argument("settings", nargs="?", type=Path, metavar="SETTINGS", help="YAML file (default: the sample)")
    parser.add_argument("--rank", type=int, metavar="R", help="of the largest bundle (default: engine.max_lora_rank)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"to search, besides the start (default: {SECONDS:.0f})"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: where engines look, ~/.cache/xloom/tuned)")
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure as the command line says. Raises `XloomError`."""
    settings = load_settings(arguments.settings)
    rank = chosen_rank(settings, arguments.rank)
    _need_a_gpu()
    from xloom.vllm.engine.lora_configs import MEASURED

    with console.status(f"Measuring for about {arguments.seconds:.0f} s"):
        result = measure(settings, rank, arguments.seconds, arguments.out or MEASURED)
    if arguments.json:
        console.print_json(data=result)
    else:
        _show(result, console)
    return 0


def _need_a_gpu() -> None:
    backend = load_backend("vllm")
    missing = backend.missing()
    if missing is not None:
        raise XloomError("backend_missing", "xloom tune measures vLLM's kernels, and vLLM can't run here.", missing)
    import torch

    if backend.device() != "cuda" or not torch.cuda.is_available():
        raise XloomError(
            "device_missing",
            "xloom tune measures the kernels that LoRA runs on a CUDA GPU, and there is none here.",
            "Run it on a machine that serves on one; on CPU there is nothing to tune.",
        )


def chosen_rank(settings: Settings, given: int | None) -> int:
    """The rank engines make room for. `auto` is what a running deployment finds out; its least is taken here."""
    from xloom.app import lora_rank

    if given is not None and given < 1:
        raise XloomError("invalid_settings", f"--rank is {given}.", "It must be 1 or more.")
    return given or lora_rank(settings, ())


def measure(settings: Settings, rank: int, seconds: float, root: Path) -> dict[str, Any]:
    """Search on this machine's GPU, write what was found, and return it as plain data."""
    import torch

    from xloom.vllm.engine.arguments import shapes_of
    from xloom.vllm.engine.lora_configs import write_configs
    from xloom.vllm.engine.lora_timing import configs_of, graph_timer, search

    started = time.monotonic()
    shapes = shapes_of(settings.model, settings.engine, rank)
    name = torch.cuda.get_device_name()
    dtype = torch.float16 if settings.engine.dtype == "float16" else torch.bfloat16
    slots = settings.engine.max_adapters
    found = search(shapes, slots, seconds, device="cuda", dtype=dtype, timer=graph_timer)
    folder = write_configs(root, name, shapes, configs_of(found, slots))
    return {
        "gpu": name,
        "folder": str(folder),
        "rank": shapes.rank,
        "seconds": round(time.monotonic() - started, 1),
        "kernels": [plain(best) for best in found],
    }


def plain(best: Best) -> dict[str, Any]:
    """A finding as JSON has it."""
    shape = best.case.shape
    return {
        "operator": best.case.operator,
        "rows": best.case.rows,
        "slices": shape.slices,
        "k": shape.k,
        "n": shape.n,
        "default_us": round(best.default_us, 2),
        "us": round(best.us, 2),
        "config": best.config,
    }


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("rows", "kernel", "default", "tuned", "")
    kernels = result["kernels"]
    for rows, operator in sorted({(each["rows"], each["operator"]) for each in kernels}):
        these = [each for each in kernels if (each["rows"], each["operator"]) == (rows, operator)]
        before, after = (sum(each[key] for each in these) for key in ("default_us", "us"))
        table.add_row(str(rows), operator, f"{before:.1f} µs", f"{after:.1f} µs", f"{after / before:.2f}")
    console.print(f"{result['gpu']}, rank {result['rank']}: a layer's linears, in {result['seconds']:.0f} s")
    console.print(table)
    console.print(escape(result["folder"]), soft_wrap=True)
