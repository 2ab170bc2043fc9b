"""`xloom quantize`: what `isq` does at load, done ahead of time, and what it costs in size and perplexity."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloom.protocol import XloomError
from xloom.quantization import recipes
from xloom.settings import IsqSettings, ModelSettings, load_settings

if TYPE_CHECKING:
    from xloom.engines.base import Device

MIB = 1 << 20


def add_parser(commands: Any) -> None:
    """The command's options."""
    text = "Quantise a model ahead of time, into the cache that `isq` uses, and report size, time and perplexity."
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize",
        help=text,
        description=text,
        epilog="example: xloom quantize ./model --method gptq --bits 4 --out ./model-w4",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, hub id, or YAML settings file (default: the sample's)"
    )
    parser.add_argument("--method", choices=recipes.METHODS, help="(default: the settings' isq.method, else awq)")
    parser.add_argument("--bits", type=int, choices=recipes.BITS, help="(default: the settings' isq.bits, else 4)")
    parser.add_argument("--group-size", type=int, metavar="N", help="input channels that share a scale (default: 128)")
    parser.add_argument(
        "--calibration", metavar="TEXT", help="sample, a .txt, .json or .jsonl file, or a hub dataset (default: sample)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="windows of 512 tokens to look at (default: 128)")
    parser.add_argument("--device", choices=recipes.DEVICES, help="it will be served on (default: this machine's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the result here; model.source may then name it")
    parser.add_argument("--no-perplexity", action="store_true", help="leave out what takes longest on a large model")
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Quantise as the command line says. Raises `XloomError`."""
    model, isq = chosen(arguments)
    if isq.bits == "auto":
        raise XloomError("invalid_settings", "isq.bits is auto, which is settled at load.", "Give --bits 2, 4 or 8.")
    from xloom.quantization.model_cache import read_done
    from xloom.quantization.quantise import plan, quantised_folder
    from xloom.quantization.source import plain_model

    device = arguments.device or _device()
    if arguments.out is not None and arguments.out.exists() and any(arguments.out.iterdir()):
        raise XloomError("folder_not_empty", f"{arguments.out} is not empty.", "Name a new folder with --out.")
    settled = plan(plain_model(model), isq, device)
    folder = quantised_folder(settled, isq, device)
    result: dict[str, Any] = read_done(folder)
    if not arguments.no_perplexity:
        result["perplexity"] = _perplexities(settled.model.folder, folder, isq.calibration)
    if arguments.out is not None:
        shutil.copytree(folder, arguments.out, dirs_exist_ok=True)
        folder = arguments.out
    result = {"folder": str(folder), "method": isq.method, "bits": isq.bits, "device": device} | result
    if arguments.json:
        console.print_json(data=result)
    else:
        _show(result, console)
    return 0


def chosen(arguments: argparse.Namespace) -> tuple[ModelSettings, IsqSettings]:
    """Model and isq settings: those of the settings file, or of the model alone, with the options on top."""
    named: str | None = arguments.model
    if named is None or named.endswith((".yaml", ".yml")):
        settings = load_settings(None if named is None else Path(named))
        model, isq = settings.model, settings.isq or IsqSettings()
    else:
        model, isq = ModelSettings(source=named), IsqSettings()
    options = {
        "method": arguments.method,
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "calibration": arguments.calibration,
        "calibration_samples": arguments.samples,
    }
    given = {key: value for key, value in options.items() if value is not None}
    for key in ("group_size", "calibration_samples"):
        if given.get(key, 1) < 1:
            raise XloomError("invalid_settings", f"{key} is {given[key]}.", "It must be 1 or more.")
    return model, isq.model_copy(update=given)


def _device() -> Device:
    from xloom.engines.registry import load_backend

    return load_backend("vllm").device()


def _perplexities(plain: Path, quantised: Path, calibration: str) -> list[float]:
    from xloom.quantization.evaluation import held_out_windows, model_perplexity

    windows = held_out_windows(plain, calibration)
    return [round(model_perplexity(folder, windows), 4) for folder in (plain, quantised)]


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table(box=None, padding=(0, 1))
    for column in ("", "before", "after", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in (("quantised linears", "linear_bytes"), ("all weights", "weight_bytes")):
        before, after = result[key]
        table.add_row(name, f"{before / MIB:.1f} MiB", f"{after / MIB:.1f} MiB", f"{after / before:.2f}")
    if "perplexity" in result:
        before, after = result["perplexity"]
        table.add_row("held-out perplexity", f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}")
    console.print(f"{result['method']} at {result['bits']} bits on {result['device']}, in {result['seconds']:.1f} s")
    console.print(table)
    console.print(escape(result["folder"]), soft_wrap=True)
