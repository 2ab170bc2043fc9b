"""A server's processes by the part they play: their CPU time and their memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Of one part, all its processes together; bytes."""

    processes: int
    peak: int  # sum of VmHWM: pages shared between processes count once for each
    proportional: int  # sum of PSS: shared pages divided among those who map them


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and all its descendants that live."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def role(process: psutil.Process, root: psutil.Process) -> str:
    """The part a process plays, from the title that Ray, vLLM or HAProxy gave it."""
    words = process.cmdline()
    title = words[0] if words else process.name()
    if title.startswith("ray::ServeReplica:"):
        return "router" if "router" in title.lower() or "ingress" in title.lower() else "replica"
    for part, mark in (
        ("engine core", "VLLM::EngineCore"),
        ("worker", "VLLM::Worker"),
        ("HTTP proxy", "ray::ProxyActor"),
        ("HTTP proxy", "haproxy"),
        ("HTTP proxy", "ray::HAProxyManager"),
        ("Serve controller", "ray::ServeController"),
        ("adapter store", "ray::AdapterStore"),
    ):
        if mark in title:
            return part
    line = " ".join(words)
    if title.startswith("ray::") or "/ray/" in line:
        return "Ray's own"
    if "multiprocessing.spawn" in line:  # vLLM could not set their titles
        parent = process.parent()
        return "worker" if parent is not None and role(parent, root) == "engine core" else "engine core"
    if process == root:
        return "API server" if "api_server" in line else "launcher"
    return "other"


def cpu_seconds(root: psutil.Process) -> dict[str, float]:
    """User and system time so far, by part."""
    found: dict[str, float] = defaultdict(float)
    for process in tree(root):
        try:
            times = process.cpu_times()
            found[role(process, root)] += times.user + times.system
        except psutil.Error:
            continue  # it ended meanwhile
    return dict(found)


def machine_cpu_seconds() -> float:
    """Processor time all processes of the machine have used so far, over all cores."""
    times = psutil.cpu_times()
    # Of Linux: guest time is part of user time; stolen time went to other machines, so it is as good as used.
    return float(times.user + times.nice + times.system + times.irq + times.softirq + getattr(times, "steal", 0.0))


def memory(root: psutil.Process) -> dict[str, Memory]:
    """Peak and proportional memory, by part."""
    found: dict[str, Memory] = {}
    for process in tree(root):
        try:
            part = role(process, root)
            peak, proportional = _peak(process.pid), _proportional(process.pid)
        except (psutil.Error, OSError):
            continue
        had = found.get(part, Memory(0, 0, 0))
        found[part] = Memory(had.processes + 1, had.peak + peak, had.proportional + proportional)
    return found


def _peak(pid: int) -> int:
    return _kib(Path(f"/proc/{pid}/status"), "VmHWM:")


def _proportional(pid: int) -> int:
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def _kib(file: Path, field: str) -> int:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
