"""`xloom doctor SETTINGS --gpu-memory SIZE`: whether a GPU of that size serves them, and where its memory goes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xloom.engines.sizing import GIB, STEP, WIDTH, Plan, Shape, needed, padded, plan
from xloom.protocol import XloomError
from xloom.settings import IsqSettings, ModelSettings, Settings, load_settings

AUTO_RANK = 64  # what `max_lora_rank: auto` leaves room for at least (xloom.app)
_UNITS = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6, "": GIB}


def memory_size(text: str) -> int:
    """Bytes of a size as 24GiB, 24GB or 24 (GiB). Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb|)", text.strip().lower())
    if found is None or not float(found[1]):
        raise ValueError(text)
    return int(float(found[1]) * _UNITS[found[2]])


def read_shape(model: ModelSettings) -> Shape:
    """A model's sizes, from its folder or the hub. Raises `XloomError` (unreadable_model, unknown_shape)."""
    file = Path(model.source).expanduser() / "config.json"
    try:
        if file.is_file():
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        else:
            from transformers import PretrainedConfig

            config, _ = PretrainedConfig.get_config_dict(model.source, revision=model.revision)
    except (OSError, ValueError, ImportError) as error:
        what = f"The configuration of {model.source!r} can't be read: {error}"
        raise XloomError("unreadable_model", what, "Name a local folder or a hub id that can be reached.") from None
    return Shape.of(config.get("text_config", config).get)


def weight_bytes(shape: Shape, isq: IsqSettings | None) -> float:
    """Bytes of one weight, on average: quantised linears in 4 bits at least, with a scale for each group."""
    if isq is None:
        return WIDTH
    bits = 8 if isq.bits == 8 else 4
    linears = shape.layers * sum(inputs * outputs for inputs, outputs, _ in shape.linears())
    each = bits / 8 + (WIDTH / isq.group_size if bits < 8 else 0)
    return (linears * each + (shape.weights() - linears) * WIDTH) / shape.weights()


def plan_for(settings: Settings, memory: int) -> tuple[Plan, int]:
    """Where the memory of each device goes, and the rank its slots are made for. Raises `XloomError`."""
    engine = settings.engine
    wanted = AUTO_RANK if engine.max_lora_rank == "auto" else engine.max_lora_rank
    rank = padded(wanted) or wanted
    shape = read_shape(settings.model)
    found = plan(
        shape,
        memory,
        slots=engine.max_adapters,
        rank=rank,
        devices=engine.tensor_parallel_size,
        share=engine.paged_attention.gpu_memory_fraction,
        weight_bytes=weight_bytes(shape, settings.isq),
        page=engine.paged_attention.block_size,
    )
    return found, rank


def show_plan(file: Path | None, memory: int, console: Console, *, as_json: bool) -> int:
    """Print it; 1 when a request of the full length does not fit. Raises `XloomError`."""
    settings = load_settings(file, with_keys=False)
    found, rank = plan_for(settings, memory)
    engine, length = settings.engine, settings.engine.max_model_len
    need = needed(length, found.page, mixture=settings.xlora_enabled)
    fits = found.pages >= need
    counts = {kind: found.requests(length, mixture=kind == "mixture") for kind in ("plain", "mixture")}
    if as_json:
        data = asdict(found) | {"step": STEP, "pages": found.pages, "pages_needed": need, "requests": counts}
        console.print_json(data=data | {"fits": fits})
        return 0 if fits else 1
    rows = [
        (
            "the engine's share",
            found.share,
            f"{engine.paged_attention.gpu_memory_fraction:g} of {memory / GIB:.1f} GiB",
        ),
        ("weights", found.weights, f"on each of {engine.tensor_parallel_size} devices"),
        ("LoRA slots", found.slots, f"max_adapters {engine.max_adapters}, rank {rank}"),
        ("a step, graphs, CUDA", STEP, "left free; not measured"),
        ("KV pages", found.pages * found.page * found.token, f"{found.pages:,} pages of {found.page} tokens"),
    ]
    table = Table(show_header=False, box=None, padding=(0, 1))
    for name, size, how in rows:
        table.add_row(name, f"{size / GIB:.2f} GiB", how)
    console.print(table)
    if fits:
        said = f"{counts['plain']} requests of {length:,} tokens have pages at once"
        said += f", or {counts['mixture']} of a mixture" if settings.xlora_enabled else ""
        console.print(f"\n[green]It fits: {said}.[/green]")
    else:
        cure = "Lower max_adapters, max_lora_rank or max_model_len, quantise (isq), or take more or larger devices."
        console.print(f"\n[red]A request of {length:,} tokens needs {need:,} pages.[/red] {cure}")
    return 0 if fits else 1
