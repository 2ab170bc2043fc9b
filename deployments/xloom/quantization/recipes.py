"""What each method does at each number of bits on each device, as data: a recipe, or why there is none.

What the kernels take is vLLM 0.32's: `CPUWNA16LinearKernel`, `Dynamic4bitLinearKernel` and
`CPUInt8ScaledMMLinearKernel` on CPU; Machete, Marlin and CUTLASS int8 on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from xloom.protocol import XloomError
from xloom.settings import IsqMethod

METHODS: tuple[IsqMethod, ...] = get_args(IsqMethod)
BITS = (2, 4, 8)
DEVICES = ("cpu", "cuda")
SCALE_BYTES = 2  # of one scale, in the checkpoint's own dtype (bfloat16 or float16)
KERNEL_MULTIPLE = 32  # CPU kernels with 4-bit weights take rows and columns in multiples of this
CUDA_GROUP_SIZES = (128, 64, 32)  # MARLIN_SUPPORTED_GROUP_SIZES, vLLM 0.32

Scheme = Literal["W4A16", "W4A8", "W8A8"]
Shapes = Mapping[str, tuple[int, int]]  # module -> (out, in)


@dataclass(frozen=True)
class Recipe:
    """How one case is done.

    `scheme` is what the engine runs: WnAm has weights of n bits and activations of m (16: not quantised). `bits` are
    the weights' numerics, `stored_bits` what one takes on disk, `memory_bits` in the engine's memory.
    """

    method: IsqMethod
    bits: int
    scheme: Scheme
    stored_bits: int
    memory_bits: int
    grouped: bool  # `group_size` input channels share a scale; else one scale for each output channel
    symmetric: bool = True
    activation_bits: int | None = None  # dynamic, one scale for each token
    note: str = ""

    @property
    def smooths(self) -> bool:
        """Whether scales are folded into the layers before: adapters must be rescaled to fit."""
        return self.method in ("awq", "smoothquant")

    @property
    def calibrates(self) -> bool:
        """Whether it looks at text."""
        return self.method != "rtn"


@dataclass(frozen=True)
class Refusal:
    """Why a case is not done."""

    reason: str


Case = Recipe | Refusal

_TWO_BITS = "2-bit weights in a 4-bit container: the memory of 4 bits"
_NO_TWO_BIT_ACTIVATIONS = (
    "SmoothQuant moves the outliers of activations into the weights, and there is no kernel with 2-bit weights and "
    "8-bit activations that would gain from it"
)
_NO_CUDA_W4A8 = "vLLM's CUDA kernels do not take 4-bit weights with int8 activations"


def case(method: IsqMethod, bits: int, device: str) -> Case:
    """The recipe of a case, or its refusal."""
    if device not in DEVICES:
        return Refusal(f"vLLM's quantised kernels are for {' and '.join(DEVICES)}")
    if bits == 8:
        return Recipe(method, 8, "W8A8", 8, 8, grouped=False, activation_bits=8)
    if method == "smoothquant":
        if bits == 2:
            return Refusal(_NO_TWO_BIT_ACTIVATIONS)
        if device == "cuda":
            return Refusal(_NO_CUDA_W4A8)
        # CompressedTensorsW4A8Int registers the int8 weights under two names and packs one of them; vLLM 0.32.
        note = "8 bits on disk, vLLM keeps them beside the packed ones; slow on x86"
        return Recipe(method, 4, "W4A8", 8, 12, grouped=True, activation_bits=8, note=note)
    if bits == 4:
        return Recipe(method, 4, "W4A16", 4, 4, grouped=True)
    return Recipe(method, 2, "W4A16", 4, 4, grouped=True, symmetric=False, note=_TWO_BITS)


def cases(device: str) -> frozenset[tuple[str, int]]:
    """Method and bits of all that works on a device."""
    return frozenset(
        (method, bits) for method in METHODS for bits in BITS if isinstance(case(method, bits, device), Recipe)
    )


def recipe_for(method: IsqMethod, bits: int, device: str) -> Recipe:
    """The recipe of a case. Raises `XloomError` (isq_unsupported) that says which cases there are."""
    found = case(method, bits, device)
    if isinstance(found, Recipe):
        return found
    known = ", ".join(f"{name} at {count}" for name, count in sorted(cases(device))) or "none"
    elsewhere = [other for other in DEVICES if isinstance(case(method, bits, other), Recipe)]
    where = f"It works on {' and '.join(elsewhere)}. " if elsewhere else ""
    raise XloomError(
        "isq_unsupported",
        f"{method} at {bits} bits is not done on {device}: {found.reason}.",
        f"{where}On {device} there are: {known}. See docs/quantisation.md.",
    )


def group_sizes(linears: Shapes, wanted: int, device: str, ranks: int = 1) -> dict[str, int]:
    """The group size of each kind of linear (last part of its name): the largest that divides its columns.

    Not above `wanted`, and one that the device's kernels take. With tensor parallelism over `ranks` each rank's share
    of the columns is divided. Raises `XloomError`: isq_group_size, isq_unsupported_model.
    """
    columns: dict[str, int] = {}
    for name, (rows, count) in linears.items():
        kind = name.rsplit(".", 1)[-1]
        share, left = divmod(count, ranks)
        if left or share % KERNEL_MULTIPLE or rows % KERNEL_MULTIPLE:
            raise XloomError(
                "isq_unsupported_model",
                f"{name} is {rows} x {count}; kernels with 4-bit weights take multiples of {KERNEL_MULTIPLE}, "
                f"on each of {ranks} ranks.",
                "Use isq.bits 8, or no isq.",
            )
        columns[kind] = math.gcd(columns.get(kind, 0), share)
    return {kind: _group_size(count, wanted, device) for kind, count in columns.items()}


def _group_size(columns: int, wanted: int, device: str) -> int:
    known = CUDA_GROUP_SIZES if device == "cuda" else range(min(wanted, columns), KERNEL_MULTIPLE - 1, -1)
    for size in known:
        if size <= wanted and columns % size == 0 and size % KERNEL_MULTIPLE == 0:
            return size
    raise XloomError(
        "isq_group_size",
        f"isq.group_size {wanted} is below {KERNEL_MULTIPLE}, the smallest that the kernels take.",
        f"Set it to {KERNEL_MULTIPLE} or more; 128 is usual.",
    )


def memory_bytes(recipe: Recipe | None, weights: int, others: int, group_size: int, dtype_bytes: int = 2) -> int:
    """Bytes of a model's weights in the engine: `weights` in decoder linears, `others` elsewhere, which stay as is."""
    if recipe is None:
        return (weights + others) * dtype_bytes
    scales = weights * SCALE_BYTES // group_size if recipe.grouped else 0
    return weights * recipe.memory_bits // 8 + scales + others * dtype_bytes


_ROUNDING = {
    "awq": "weights scaled by what activations show to matter, then rounded",
    "gptq": "rounded column by column, each error made up for by the columns left",
    "rtn": "rounded to the nearest; no calibration",
    "smoothquant": "outliers of activations moved into the weights, then rounded",
}
_SCHEMES = {
    "W4A16": "4-bit weights in groups, 16-bit activations",
    "W4A8": "4-bit weights in groups, 8-bit activations",
    "W8A8": "8-bit weights, 8-bit activations with a scale for each token",
}


def table() -> list[dict[str, str]]:
    """One row for each of the twelve cases: method, bits, and for each device what is run or why not."""
    rows = []
    for method in METHODS:
        for bits in BITS:
            row = {"method": method, "bits": str(bits)}
            for device in DEVICES:
                found = case(method, bits, device)
                if isinstance(found, Recipe):
                    row[device] = found.scheme + (f" ({found.note})" if found.note else "")
                else:
                    row[device] = f"refused: {found.reason}"
            rows.append(row)
    return rows


def as_markdown() -> str:
    """The table and the meaning of its terms, as docs/quantisation.md has them."""
    lines = ["| method | bits | CPU | CUDA |", "|---|---|---|---|"]
    lines += [f"| `{row['method']}` | {row['bits']} | {row['cpu']} | {row['cuda']} |" for row in table()]
    lines += ["", "| method | what it does |", "|---|---|"]
    lines += [f"| `{method}` | {_ROUNDING[method]} |" for method in METHODS]
    lines += ["", "| scheme | what the engine runs |", "|---|---|"]
    lines += [f"| {scheme} | {meaning} |" for scheme, meaning in _SCHEMES.items()]
    return "\n".join(lines)
