"""Measured configurations of the LoRA kernels: files in vLLM's format, and which of them an engine may be given.

vLLM looks a kernel's configuration up by its shape (`vllm.lora.ops.triton_ops.utils`: `load_lora_op_config` and
`get_lora_op_configs`, vLLM 0.32): `config[max_loras + 1][slices][m][k][n]`, the nearest number at each level but
`slices`, where a missing one ends the engine's start in a KeyError. So a file is used when it is complete, and no
other; and since the nearest shape may be far from the model's, only when it was measured for the model's own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xloom.protocol import XloomError

logger = logging.getLogger(__name__)

VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"
MEASURED = Path("~/.cache/xloom/tuned")  # by `xloom tune`, on this machine
SHIPPED = Path(__file__).parents[1] / "tuned"
SLICES = (1, 2, 3)  # what a decoder's linears come in: alone, gate and up, query, key and value
SUFFIXES = {"SHRINK": "shrink", "EXPAND_TRUE": "expand", "EXPAND_FALSE": "expand"}  # file -> operator
NEEDED = {
    "shrink": ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages", "num_ctas"),
    "expand": ("block_m", "block_n", "block_k", "num_warps", "num_stages", "num_ctas"),
}

Config = dict[str, int | None]


@dataclass(frozen=True)
class Shape:
    """One LoRA product: `slices` matrices over the same rows. `k` is summed over, `n` is the widest slice's width."""

    slices: int
    k: int
    n: int
    narrow: int | None = None  # width of the other slices, where it differs: key and value

    @property
    def widths(self) -> list[int]:
        return [self.n, *[self.narrow or self.n] * (self.slices - 1)]


@dataclass(frozen=True)
class LoRAShapes:
    """The products of a decoder's linears on one rank of tensor parallelism."""

    rank: int  # engines make room for
    shrink: tuple[Shape, ...]
    expand: tuple[Shape, ...]

    @property
    def name(self) -> str:
        """A folder's name: the rank, and the widths the model's linears read."""
        return "-".join([f"rank{self.rank}", *map(str, sorted({shape.k for shape in self.shrink}))])

    def of(self, operator: str) -> tuple[Shape, ...]:
        return self.shrink if operator == "shrink" else self.expand


def lora_shapes(config: Any, rank: int, tensor_parallel: int = 1) -> LoRAShapes:
    """The shapes from a model's text configuration (transformers); `rank` is vLLM's `max_lora_rank`.

    Raises `XloomError` for a model whose sizes its configuration does not give.
    """
    try:
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or hidden // heads)
        query = heads * head // tensor_parallel
        key = head * max(1, int(getattr(config, "num_key_value_heads", None) or heads) // tensor_parallel)
        inner = int(config.intermediate_size) // tensor_parallel
    except (AttributeError, TypeError) as error:
        raise XloomError(
            "unsupported_architecture",
            f"The sizes of this model's linears are not in its configuration: {error}",
            "Serve it with vLLM's default kernel configurations.",
        ) from error
    read = [Shape(3, hidden, rank), Shape(1, query, rank), Shape(2, hidden, rank), Shape(1, inner, rank)]
    narrow = key if key != query else None
    written = [Shape(3, rank, query, narrow), Shape(1, rank, hidden), Shape(2, rank, inner)]
    return LoRAShapes(rank, tuple(dict.fromkeys(read)), tuple(written))


def file_name(device_name: str, suffix: str) -> str:
    """As vLLM looks for it; `device_name` as CUDA has it."""
    return f"{re.sub('[ -]', '_', device_name)}_{suffix}.json"


def fault(config: Any, operator: str, shapes: LoRAShapes) -> str | None:
    """Why vLLM should not be given a file's content for these shapes; None when it may be."""
    if not isinstance(config, dict) or not config:
        return "it has no configurations"
    for max_loras, by_slices in config.items():
        if not _numbered({max_loras: by_slices}):
            return f"{max_loras!r} is not a number of adapters with configurations"
        for slices in SLICES:
            by_m = by_slices.get(str(slices))
            if not _numbered(by_m):
                return f"it lacks {slices} slices"
            wanted = [shape for shape in shapes.of(operator) if shape.slices == slices]
            for m, by_k in by_m.items():
                if not _numbered(by_k) or not all(map(_numbered, by_k.values())):
                    return f"it has nothing for {slices} slices of {m} rows"
                leaves = [leaf for by_n in by_k.values() for leaf in by_n.values()]
                if not all(_usable(leaf, NEEDED[operator]) for leaf in leaves):
                    return f"a configuration for {slices} slices of {m} rows is not one of this kernel's"
                for shape in wanted:
                    if str(shape.n) not in by_k.get(str(shape.k), {}):
                        return f"{slices} slices of {shape.k} by {shape.n} were not measured"
    return None


def _numbered(level: Any) -> bool:
    """A level that vLLM can search: at least one entry, each under a number."""
    return isinstance(level, dict) and bool(level) and all(str(key).isdigit() for key in level)


def _usable(leaf: Any, needed: Sequence[str]) -> bool:
    values = [leaf.get(name) for name in needed] if isinstance(leaf, dict) else [None]
    # Triton's blocks and warps are powers of two.
    sizes = [leaf[name] for name in needed if name.startswith(("block_", "num_warps"))] if None not in values else []
    return all(type(value) is int and value > 0 for value in values) and all(size & (size - 1) == 0 for size in sizes)


def tuned_folder(
    device_name: str,
    shapes: LoRAShapes,
    roots: Iterable[Path] = (MEASURED, SHIPPED),
    environment: Mapping[str, str] = os.environ,
) -> Path | None:
    """The folder for `VLLM_TUNED_CONFIG_FOLDER`, or None: nothing fits, or the operator has chosen one himself.

    A root has a folder for each set of shapes; one is taken whole, when each of its files for this GPU can be used,
    since vLLM reads whatever lies there.
    """
    if environment.get(VARIABLE) is not None:
        return None
    for root in roots:
        for folder in sorted(path for path in root.expanduser().glob("*") if path.is_dir()):
            files = {suffix: folder / file_name(device_name, suffix) for suffix in SUFFIXES}
            found = {suffix: file for suffix, file in files.items() if file.is_file()}
            if found and all(_fits(file, SUFFIXES[suffix], shapes) for suffix, file in found.items()):
                return folder
    return None


def _fits(file: Path, operator: str, shapes: LoRAShapes) -> bool:
    try:
        why = fault(json.loads(file.read_text(encoding="utf-8")), operator, shapes)
    except (OSError, ValueError) as error:
        why = str(error)
    if why is not None:
        logger.info("kernel configurations in %s are not used: %s", file, why)
    return why is None


def write_configs(root: Path, device_name: str, shapes: LoRAShapes, configs: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write files, by suffix, and return their folder. All or none: raises `XloomError` before any is incomplete."""
    for suffix, config in configs.items():
        why = fault(config, SUFFIXES[suffix], shapes)
        if why is not None:
            raise XloomError("tuning_incomplete", f"{suffix} was not measured whole: {why}.", "Give it more --seconds.")
    folder = root.expanduser() / shapes.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, config in configs.items():
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as part:
                json.dump(config, part)
            os.replace(part.name, folder / file_name(device_name, suffix))
    except OSError as error:
        raise XloomError(
            "tuning_unwritable",
            f"The configurations could not be written to {folder}: {error}",
            "Name a folder with --out.",
        ) from error
    return folder
