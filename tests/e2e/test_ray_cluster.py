"""`xloom build` and `serve deploy` on a Ray cluster of two nodes that was started from the command line."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from .served import API_KEY, TOKENS, free_port, wait_until
from .weights import Oracle, Weights, settings_for

pytestmark = pytest.mark.slow

PROMPT = list(range(40, 70))
PROGRAMS = Path(sys.executable).parent
WORKER_PORTS = 400


class RayCluster:
    """Two raylets on this machine, with ports, folder and token of their own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="xl-", dir="/tmp"))  # sockets need a short path
        self._token = secrets.token_hex(32)
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XLOOM_", "VLLM_"))
        }
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "XLOOM_API_KEY": API_KEY,
        }
        self._gcs, self._dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{self._dashboard}"

    def start(self) -> None:
        """A head and a worker, each with CPUs for one engine."""
        head = ["--head", "--port", self._gcs, "--dashboard-port", self._dashboard, "--temp-dir", self.folder]
        self._node(40000, *head, "--num-cpus", 2)
        self._node(40000 + WORKER_PORTS, "--address", f"127.0.0.1:{self._gcs}", "--num-cpus", 2)

    def _node(self, first_port: int, *options: Any) -> None:
        ports = ["--min-worker-port", first_port, "--max-worker-port", first_port + WORKER_PORTS - 1]
        agent = ["--dashboard-agent-listen-port", free_port(), "--ray-client-server-port", free_port()]
        self.run("ray", "start", "--node-ip-address", "127.0.0.1", "--disable-usage-stats", *agent, *ports, *options)

    def run(self, program: str, *arguments: Any) -> str:
        """Run a program of the environment; returns what it printed, and fails with it."""
        done = subprocess.run(
            [str(PROGRAMS / program), *map(str, arguments)],
            env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that it started: they inherit its token."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN") == self._token:
                    found.append(process)
        return found

    def stop(self) -> None:
        """End all of it."""
        for _ in range(2):
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(self.processes(), timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    made = RayCluster()
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def url(cluster: RayCluster, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The endpoint of a deployment with an engine on each node."""
    folder, port = tmp_path_factory.mktemp("cluster"), free_port()
    settings = settings_for(
        weights,
        replicas={"min": 2, "max": 2, "cpus": 1.5},
        router={"port": port},
        store={"path": str(folder / "store"), "cache": str(folder / "cache")},
    )
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    cluster.run("xloom", "build", folder / "settings.yaml", "-o", folder / "serve.yaml")
    assert API_KEY not in (folder / "serve.yaml").read_text()
    cluster.run("serve", "deploy", folder / "serve.yaml", "-a", cluster.dashboard)

    def is_ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5, trust_env=False)
            return answer.status_code == 200 and answer.json()["replicas"] == 2
        return False

    try:
        wait_until(is_ready, 400, "two replicas behind the endpoint", 0.5)
    except AssertionError:
        print(cluster.run("serve", "status", "-a", cluster.dashboard))
        raise
    return f"http://127.0.0.1:{port}"


def test_each_node_has_an_engine(url: str) -> None:
    answer = httpx.get(f"{url}/xloom/status", headers={"Authorization": f"Bearer {API_KEY}"}, trust_env=False)
    assert len({replica["node"] for replica in answer.json()["replicas"]}) == 2


def test_the_key_in_the_clusters_environment_is_asked_for(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401


def test_every_model_answers_as_peft_does(url: str, oracle: Oracle) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0) as client:
        for name in ("base", "alpha", "blend"):
            answer = client.completions.create(
                model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=TOKENS
            )
            assert answer.choices[0].model_extra["token_ids"] == oracle(name, tuple(PROMPT), 12)
