"""The feature matrix of the backends, from what each says it can do: the table in docs/backends.md.

`python -m xloom.commands.features docs/backends.md` writes it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
# Where a backend was run as it is now, and where its quantising was; what is said of other devices is "not run".
# docs/gpu.md tells what was seen of vLLM on a GPU.
RAN: Mapping[str, tuple[Device, ...]] = {"vllm": ("cpu", "cuda"), "transformers": ("cpu",), "mistralrs": ("cpu",)}
ISQ_RAN: Mapping[str, tuple[Device, ...]] = dict.fromkeys(RAN, ("cpu",))
DEVICES: Mapping[Device, str] = {"cpu": "CPU", "cuda": "CUDA", "metal": "Metal"}
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"


def rows(
    capabilities: Mapping[str, Capabilities],
    install_mib: Mapping[str, int],
    ran: Mapping[str, tuple[Device, ...]],
    isq_ran: Mapping[str, tuple[Device, ...]],
) -> list[list[str]]:
    """The matrix, its head first: a row for each feature, a column for each backend; "yes" for what was run alone."""

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    table = [["feature", *capabilities]]
    table.append(["single-user inference", *("yes" for _ in capabilities)])
    table.append(["PagedAttention", *(yes(can.paged_attention) for can in capabilities.values())])
    table.append(["X-LoRA", *(_where(can.xlora, ran.get(name, ())) for name, can in capabilities.items())])
    table += [
        [f"ISQ, `{method}`", *(_isq(can, method, isq_ran.get(name, ())) for name, can in capabilities.items())]
        for method in get_args(IsqMethod)
    ]
    table += [
        [title, *(_runs(device, can, ran.get(name, ())) for name, can in capabilities.items())]
        for device, title in DEVICES.items()
    ]
    table.append(["install size (MiB)", *(_size(install_mib.get(name)) for name in capabilities)])
    return table


def _runs(device: Device, can: Capabilities, ran: tuple[Device, ...]) -> str:
    if device not in can.devices:
        return "no"
    return "yes" if device in ran else "not run"


def _where(devices: Sequence[Device], ran: tuple[Device, ...]) -> str:
    """Of devices where something is written to work: those where it was seen to, and the others."""
    if not devices:
        return "no"
    seen = [DEVICES[device] for device in devices if device in ran]
    unseen = [DEVICES[device] for device in devices if device not in ran]
    if not unseen and len(seen) == len(DEVICES):
        return "yes"
    told = [f"{', '.join(names)}: {word}" for names, word in ((seen, "yes"), (unseen, "not run")) if names]
    return "; ".join(told)


def _isq(can: Capabilities, method: str, ran: tuple[Device, ...]) -> str:
    """The bits by device; devices that take the same are named together."""
    by_bits: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for device in get_args(Device):
        bits = tuple(sorted(bits for name, bits in can.isq.get(device, frozenset()) if name == method))
        if bits:
            by_bits.setdefault((bits, device in ran), []).append(DEVICES[device])
    if not by_bits:
        return "no"
    return "; ".join(
        f"{', '.join(map(str, bits))} bits"
        + ("" if run and len(names) == len(DEVICES) else f" ({', '.join(names)}{'' if run else ': not run'})")
        for (bits, run), names in by_bits.items()
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
    head, *body = rows(capabilities, INSTALL_MIB, RAN, ISQ_RAN)
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
