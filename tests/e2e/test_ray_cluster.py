"""docs/ray-clusters.md and docs/kubernetes.md, command by command, on the cluster that `make cluster` starts."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.pages import ROOT, Block, Reader, to_run
from xloom.router.draining import folder_of
from xloom.settings import SAMPLE

from .served import ADMIN_KEY, API_KEY, TOKENS, free_port, wait_until
from .weights import Oracle, Weights, settings_for

pytestmark = pytest.mark.slow

PROMPT = list(range(40, 70))
KEYS = {"XLOOM_API_KEY": API_KEY, "XLOOM_ADMIN_KEY": ADMIN_KEY, "HF_HUB_OFFLINE": "1"}
RAY_AT = re.compile(r"Ray is at (\S+), its dashboard at (\S+)\. .*\nexport (\S+) (\S+)\n", re.MULTILINE)
SERVED = re.compile(r"Serving (.+) at port (\d+) of the nodes")


class Site:
    """The reader of both pages, and the endpoint as it now is."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self._weights, self._folder = weights, folder
        self.stores = {"path": str(folder / "store"), "cache": str(folder / "cache"), "sources": ["/"]}
        (folder / "checkout").mkdir()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XLOOM_"))}
        self.reader = Reader(folder / "checkout", inherited | KEYS)
        self.url = ""
        self._use(self._local_settings())

    def _use(self, file: Path) -> None:
        # `make cluster` sees to the installation first, which is done here: the rest of its recipe.
        recipe = ["make", "-n", "-C", str(ROOT), "cluster", f"VENV={sys.prefix}", f"SETTINGS={file}"]
        said = subprocess.run(recipe, capture_output=True, text=True, check=True).stdout
        [command] = [line for line in said.splitlines() if "cluster/local_cluster.py" in line]
        self.reader.names |= {"make cluster": command}

    def _local_settings(self) -> Path:
        settings = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text(encoding="utf-8"))
        return self.write("local.yaml", settings | {"router": settings["router"] | {"port": self.take_port()}})

    def take_port(self) -> int:
        """A port for the next deployment."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        return port

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Write settings, with their stores in the test's folder."""
        file = self._folder / name
        file.write_text(yaml.safe_dump(content | {"store": self.stores}))
        return file

    def joined(self, said: str) -> None:
        """Take the cluster's addresses and token from what `make cluster` printed."""
        found = RAY_AT.search(said)
        assert found is not None, said
        self.reader.names |= {"HEAD:6379": found[1], "http://HEAD:8265": found[2]}
        self.reader.environment |= dict(each.split("=", 1) for each in found.groups()[2:])
        self.tiny_settings()

    def tiny_settings(self, engines: int = 1) -> None:
        """What the page's gpu.yaml is here: the tiny model at a new port; each node has room for one engine."""
        replicas = {"min": engines, "max": engines, "cpus": 1.5}
        settings = settings_for(self._weights, replicas=replicas, router={"port": self.take_port()})
        file = str(self.write("settings.yaml", settings))
        self.reader.names |= {"cluster/gpu.yaml": file, "gpu.yaml": file}

    def run(self, commands: str) -> str:
        """Commands that are on no page."""
        return self.reader.run(Block("this test", 0, commands))

    def client(self) -> openai.OpenAI:
        """A client with the key."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0)

    def get(self, path: str, key: str | None = API_KEY) -> httpx.Response:
        """GET with the key, or without."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.url + path, headers=headers, timeout=30, trust_env=False)

    def wait_ready(self, replicas: int) -> None:
        """Wait until that many replicas are behind the endpoint."""

        def is_ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                answer = self.get("/ready", None)
                return answer.status_code == 200 and answer.json()["replicas"] == replicas
            return False

        try:
            wait_until(is_ready, 400, f"{replicas} replicas behind the endpoint", 0.5)
        except AssertionError:
            print(self.run("serve status -a http://HEAD:8265"))
            raise

    def wait_gone(self) -> None:
        """Wait until nobody listens at the endpoint."""

        def is_gone() -> bool:
            try:
                self.get("/health", None)
            except httpx.TransportError:
                return True
            return False

        wait_until(is_gone, 120, "an endpoint that is gone", 0.5)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Iterator[Site]:
    """The first command of docs/ray-clusters.md runs until all tests here have ended; it must end well."""
    made = Site(tmp_path_factory.mktemp("site"), weights)
    first = to_run("ray-clusters.md")[0]
    with made.reader.running(first, ready=r"Ctrl-C\s+ends it") as said:
        served = SERVED.search(said)
        assert served is not None
        assert made.url.endswith(f":{served[2]}")
        a_token_of(made, "base")
        made.joined(said)
        yield made
    made.wait_gone()


def a_token_of(site: Site, model: str) -> None:
    """The model answers, in chat."""
    with site.client() as client:
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 1


def answers_as_peft_does(site: Site, oracle: Oracle) -> None:
    """Every model gives PEFT's tokens, to those with the key."""
    assert site.get("/v1/models", None).status_code == 401
    with site.client() as client:
        for name in ("base", "alpha", "blend"):
            answer = client.completions.create(
                model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=TOKENS
            )
            assert answer.choices[0].model_extra["token_ids"] == oracle(name, tuple(PROMPT), 12)


def job(site: Site, oracle: Oracle, run: Callable[[], str]) -> None:
    served = SERVED.search(run())
    assert served is not None
    assert served[1] == "base, alpha, beta, blend"
    assert site.url.endswith(f":{served[2]}")
    answers_as_peft_does(site, oracle)


def serve_config(site: Site, oracle: Oracle, run: Callable[[], str]) -> None:
    site.run("serve shutdown -y -a http://HEAD:8265")
    site.wait_gone()
    site.tiny_settings(engines=2)
    run()
    assert API_KEY not in (site.reader.folder / "serve.yaml").read_text()
    site.wait_ready(2)
    nodes = [replica["node"] for replica in site.get("/xloom/status").json()["replicas"]]
    assert len(set(nodes)) == 2
    answers_as_peft_does(site, oracle)


def away(site: Site, oracle: Oracle, run: Callable[[], str]) -> None:
    said = run()
    assert "RUNNING" in said
    site.wait_gone()


# What holds after a command of the page, by how its block begins.
RAY: dict[str, Callable[[Site, Oracle, Callable[[], str]], None]] = {
    "ray job submit": job,
    "xloom build": serve_config,
    "serve status": away,
}


@pytest.mark.parametrize("block", to_run("ray-clusters.md")[1:], ids=str)
def test_ray_clusters(block: Block, site: Site, oracle: Oracle) -> None:
    if block.stays:
        site.tiny_settings()
        with site.reader.running(block, ready=r"Ctrl-C\s+ends it"):
            answers_as_peft_does(site, oracle)
        site.wait_gone()
        return
    [check] = [check for start, check in RAY.items() if block.text.startswith(start)]
    check(site, oracle, lambda: site.reader.run(block))


@pytest.fixture(scope="module")
def chart(site: Site) -> Site:
    """The endpoint of docs/kubernetes.md: what the chart renders for its first example, on this cluster."""
    rendering = pytest.importorskip("tests.unit.chart.rendering", reason="Helm's SDK is not installed")
    values = rendering.example(rendering.CHART / "examples/values-cpu.yaml")
    service = rendering.one(rendering.render(values), "RayService")
    # The image's paths become this machine's.
    config = yaml.safe_load(service["spec"]["serveConfigV2"].replace("/opt/xloom/sample", str(SAMPLE)))
    settings = config["applications"][0]["args"]
    settings["router"] |= {"port": site.take_port(), "host": "127.0.0.1"}
    settings["store"] = site.stores
    (site.reader.folder / "chart.yaml").write_text(yaml.safe_dump(config))
    site.run("serve deploy chart.yaml -a http://HEAD:8265")
    site.wait_ready(1)
    site.reader.names |= {
        "http://127.0.0.1:8000": site.url,
        "s3://models/adapters/law": str(SAMPLE / "adapters" / "docs"),
    }
    return site


def test_a_pod_would_see_its_router(chart: Site) -> None:
    """By the file that helm/xloom/files/drain.sh looks for."""
    found = [each.name for each in folder_of(httpx.URL(chart.url).port or 0).iterdir()]
    assert len(found) == 1
    assert psutil.pid_exists(int(found[0]))


@pytest.mark.parametrize("block", to_run("kubernetes.md"), ids=str)
def test_kubernetes(block: Block, chart: Site) -> None:
    said = chart.reader.run(block)
    if "adapters add law" in block.text:
        assert "law" in said
        a_token_of(chart, "law")
    else:
        assert '"choices"' in said
