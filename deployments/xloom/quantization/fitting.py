"""`bits: auto`: the most bits whose weights fit the memory at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xloom.quantization.recipes import BITS, Recipe, case, memory_bytes
from xloom.settings import IsqMethod

GIB = 1 << 30
PROCESS_BYTES = int(1.5 * GIB)  # an engine's processes without weights and pages
MARGIN = 1.1  # on the weights: what loading and allocation take on top


@dataclass(frozen=True)
class Weights:
    """How many weights a model has: in decoder linears, which are quantised, and elsewhere, which stay."""

    linears: int
    others: int
    dtype_bytes: int = 2  # of one that stays


@dataclass(frozen=True)
class Choice:
    """What was chosen (None: not quantised), and why."""

    bits: int | None
    reason: str


def choose_bits(
    method: IsqMethod, device: str, weights: Weights, *, free: int, reserved: int, group_size: int = 128
) -> Choice:
    """The first of unquantised, 8, 4, 2 bits that fits `free` bytes less `reserved` (KV pages); else the smallest.

    A case that takes no less memory than one with more bits is passed over, and so is one the method has not.
    """
    budget = free - reserved - PROCESS_BYTES
    told = []
    smallest: tuple[int, int | None] | None = None  # bytes, bits
    for bits in (None, *sorted(BITS, reverse=True)):
        recipe = None if bits is None else case(method, bits, device)
        name = "unquantised" if bits is None else f"{bits} bits"
        if recipe is not None and not isinstance(recipe, Recipe):
            told.append(f"{name}: not with {method} on {device}")
            continue
        need = int(memory_bytes(recipe, weights.linears, weights.others, group_size, weights.dtype_bytes) * MARGIN)
        if smallest is not None and need >= smallest[0]:
            told.append(f"{name}: {_gib(need)}, no less than with more bits")
            continue
        smallest = (need, bits)
        if need <= budget:
            told.append(f"{name}: {_gib(need)}, fits")
            return Choice(bits, _reason(told, free, reserved, budget))
        told.append(f"{name}: {_gib(need)}, too much")
    assert smallest is not None
    told.append("nothing fits: the smallest is tried")
    return Choice(smallest[1], _reason(told, free, reserved, budget))


def _reason(told: list[str], free: int, reserved: int, budget: int) -> str:
    head = f"{_gib(free)} free, {_gib(reserved)} for KV pages, {_gib(PROCESS_BYTES)} for processes"
    return f"{head}: {_gib(max(budget, 0))} for weights; {'; '.join(told)}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def free_bytes(device: str) -> int:
    """Memory at hand: a GPU's free memory, or the machine's within its control group's limit."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    free = available_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that can be had within the control group's limit; None where the system does not tell."""
    try:
        lines = [line.split() for line in meminfo.read_text(encoding="utf-8").splitlines()]
        [free] = [int(words[1]) * 1024 for words in lines if words[:1] == ["MemAvailable:"]]
    except (OSError, ValueError, IndexError):
        return None
    limit, used = _cgroup(cgroup)
    return free if limit is None else min(free, max(limit - used, 0))


def _cgroup(folder: Path) -> tuple[int | None, int]:
    """Limit and use of memory of this control group (version 2), page cache that can be dropped not counted."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return (None if limit == "max" else int(limit)), used
    except (OSError, ValueError):
        return None, 0
