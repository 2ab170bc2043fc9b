"""The feature matrix of the backends, from what each says it can do: the table in docs/backends.md.

`python -m xloom.commands.features docs/backends.md` writes it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from xloom.engines.base import Capabilities, Device
from xloom.engines.registry import load_backend
from xloom.protocol import XloomError
from xloom.settings import IsqMethod

BACKENDS = {
    "vllm": "xloom.vllm.engine.backend:VLLMBackend",
    "transformers": "xloom.engines.transformers.backend:TransformersBackend",
    "mistralrs": "xloom.engines.mistralrs.backend:MistralRsBackend",
}
# MiB with the core and all that each requires, on Linux x86_64 and CPU: the benchmark `backends` measures it.
INSTALL_MIB: Mapping[str, int] = {"vllm": 2573, "transformers": 1067, "mistralrs": 106}
DEVICES = {"cpu": "CPU", "cuda": "CUDA", "metal": "Metal"}
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"


def rows(capabilities: Mapping[str, Capabilities], install_mib: Mapping[str, int]) -> list[list[str]]:
    """The matrix, its head first: a row for each feature, a column for each backend."""

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    table = [["feature", *capabilities]]
    table.append(["single-user inference", *("yes" for _ in capabilities)])
    table.append(["PagedAttention", *(yes(can.paged_attention) for can in capabilities.values())])
    table.append(["X-LoRA", *(yes(can.xlora) for can in capabilities.values())])
    table += [
        [f"ISQ, `{method}`", *(_isq(can, method) for can in capabilities.values())] for method in get_args(IsqMethod)
    ]
    table += [
        [name, *(yes(device in can.devices) for can in capabilities.values())] for device, name in DEVICES.items()
    ]
    table.append(["install size (MiB)", *(_size(install_mib.get(name)) for name in capabilities)])
    return table


def _isq(can: Capabilities, method: str) -> str:
    """The bits by device; devices that take the same are named together."""
    by_bits: dict[tuple[int, ...], list[str]] = {}
    for device in get_args(Device):
        bits = tuple(sorted(bits for name, bits in can.isq.get(device, frozenset()) if name == method))
        if bits:
            by_bits.setdefault(bits, []).append(DEVICES[device])
    if not by_bits:
        return "no"
    return "; ".join(
        f"{', '.join(map(str, bits))} bits" + ("" if len(names) == len(DEVICES) else f" ({', '.join(names)})")
        for bits, names in by_bits.items()
    )


def _size(mib: int | None) -> str:
    return f"{mib:,}" if mib else "not measured"


def matrix() -> str:
    """The table of xloom's own backends, as markdown."""
    capabilities = {}
    for name, entry in BACKENDS.items():
        try:
            capabilities[name] = load_backend(entry).capabilities()
        except XloomError:
            continue  # not in this installation
    head, *body = rows(capabilities, INSTALL_MIB)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_matrix(page: str) -> str:
    """The page with the table between its marks as the code has it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_matrix(file.read_text(encoding="utf-8")), encoding="utf-8")
