"""`xloom serve` as a process of its own, seen from outside: HTTP, its processes, and its log."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import yaml

from cluster.local_cluster import free_port
from xloom.processes import end_marked, marked

START_S = 420.0  # an engine takes half a minute on an idle machine
STOP_S = 30.0  # what Ctrl-C may take
POLL_S = 0.05
API_KEY = "e2e-user"
ADMIN_KEY = "e2e-admin"
MARKER = "XLOOM_E2E_RUN"  # inherited by all that the server starts, detached or not
SERVED_AT = re.compile(r"at http://127\.0\.0\.1:(\d+)/v1")
RAY_FOLDER = re.compile(r"/tmp/xloom-[^/\s=,:]+")


def wait_until(holds: Callable[[], bool], timeout_s: float, what: str, period_s: float = POLL_S) -> float:
    """Poll a condition; returns the seconds it took, and fails when the time is up."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(period_s)
    return time.monotonic() - started


class Served:
    """One running deployment. `settings` are the file's contents; the stores' folders and keys are added."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any] | None,
        *,
        port: int | None = None,
        cwd: Path | None = None,
        **environment: str,
    ) -> None:
        self._connect(free_port() if port is None else port)
        self._run = uuid.uuid4().hex
        self._log = folder / "serve.log"
        command = [str(Path(sys.executable).with_name("xloom")), "serve"]
        if settings is not None:
            file = folder / "settings.yaml"
            stores = {"path": str(folder / "store"), "cache": str(folder / "cache"), "sources": ["hf://", "/"]}
            keys = {"api_key": API_KEY, "admin_key": ADMIN_KEY}
            file.write_text(yaml.safe_dump({"store": stores, "router": keys} | settings))
            command.append(str(file))
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XLOOM_", "VLLM_"))
        }
        self._environment = inherited | {MARKER: self._run, "HF_HUB_OFFLINE": "1"} | environment
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=cwd,
                start_new_session=True,
            )

    def _connect(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(
            base_url=self.url, timeout=180, headers={"Authorization": f"Bearer {API_KEY}"}, trust_env=False
        )
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, timeout=180, max_retries=0)

    # From start to end.

    def wait_ready(self) -> None:
        """Wait until a replica can answer; what the server said is in the failure. Port 0: it says which it took."""
        try:
            wait_until(self._is_ready, START_S, "a ready server", 0.25)
        except BaseException:
            print(self.log())
            self.kill()
            raise

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"xloom serve ended with {self.process.returncode}"
        if self.port == 0:
            if said := SERVED_AT.search(self.printed()):
                self._connect(int(said[1]))
            return False
        try:
            return self.http.get("/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> float:
        """Ctrl-C; asserts that it ends in time and leaves nothing. Returns the seconds it took."""
        self.openai.close()
        self.http.close()
        if self.process.returncode is not None:
            return 0.0
        folders = self._ray_folders()
        log = self.log()
        started = time.monotonic()
        os.kill(self.process.pid, signal.SIGINT)
        try:
            code = self.process.wait(STOP_S)
            took = time.monotonic() - started
            assert code == 0, f"xloom serve ended with {code}"
            wait_until(lambda: not self.processes(), max(0.5, STOP_S - took), f"no process left: {self.processes()}")
            assert not [folder for folder in folders if folder.exists()]
        except BaseException:
            print(log, self.printed(), *map(describe, self.processes()), sep="\n")
            self.kill()
            raise
        return took

    def kill(self) -> None:
        """End all of it by force, for a test that has failed."""
        folders = self._ray_folders()
        end_marked(MARKER, self._run, timeout_s=STOP_S)
        self.process.wait()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    # What is looked at from outside.

    def processes(self) -> list[psutil.Process]:
        """All living processes that the server has started, directly or not, and itself."""
        return marked(MARKER, self._run)

    def _ray_folders(self) -> set[Path]:
        lines = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                lines.append(" ".join(process.cmdline()))
        return {Path(match) for line in lines for match in RAY_FOLDER.findall(line)}

    def printed(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def log(self) -> str:
        """What it printed, and the end of its replicas' logs."""
        parts = [self.printed()]
        for folder in self._ray_folders():
            for file in sorted(folder.glob("session_latest/logs/serve/*.log")) + sorted(
                folder.glob("session_latest/logs/worker-*.err")
            ):
                text = file.read_text(errors="replace")
                if text.strip():
                    parts.append(f"--- {file.name}\n{text[-4000:]}")
        return "\n".join(parts)

    def status(self) -> dict[str, Any]:
        """What GET /xloom/status answers."""
        answer = self.http.get("/xloom/status")
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return status

    def is_idle(self) -> bool:
        """Whether no request is anywhere and all KV pages are free, as far as the replicas have reported."""
        status = self.status()
        figures = [replica["stats"] for replica in status["replicas"]]
        return not status["router"]["in_flight"] and not any(
            each["running"] or each["waiting"] or each["kv_pages_used"] for each in figures
        )

    def wait_idle(self, timeout_s: float = 30.0) -> float:
        """Wait until no request is anywhere and all KV pages are free; returns the seconds."""
        return wait_until(self.is_idle, timeout_s, f"an idle server: {self.status()}")

    def admin(self, route: str, body: dict[str, Any], key: str | None = ADMIN_KEY) -> httpx.Response:
        """POST to a route that changes adapters."""
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {"Authorization": ""}
        return self.http.post(f"/v1/{route}", json=body, headers=headers)

    def load(self, name: str, path: Path | str, **options: Any) -> httpx.Response:
        """Add an adapter or bundle."""
        return self.admin("load_lora_adapter", {"lora_name": name, "lora_path": str(path), **options})

    def unload(self, name: str) -> httpx.Response:
        """Remove an adapter or bundle."""
        return self.admin("unload_lora_adapter", {"lora_name": name})

    def names(self) -> list[str]:
        """What /v1/models lists."""
        return [model.id for model in self.openai.models.list()]

    def greedy(self, model: str, prompt: list[int], count: int = 16) -> list[int]:
        """The next greedy tokens, end-of-text ignored."""
        answer = self.openai.completions.create(
            model=model, prompt=prompt, max_tokens=count, temperature=0, extra_body=TOKENS
        )
        tokens: list[int] = answer.choices[0].model_extra["token_ids"]
        return tokens

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an `xloom` command against the server."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("xloom")), *arguments, "--url", self.url],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=self._environment | {"XLOOM_ADMIN_KEY": ADMIN_KEY},
        )


# Fields of vLLM's own that the tests send beside OpenAI's.
TOKENS: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}


def describe(process: psutil.Process) -> str:
    """A process for a failure's message."""
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} gone"
