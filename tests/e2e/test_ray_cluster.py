"""`serve deploy`, `ray job submit` and the chart's configuration on a Ray cluster started from the command line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from cluster.local_cluster import LocalCluster
from xloom.settings import SAMPLE

from .served import API_KEY, TOKENS, free_port, wait_until
from .weights import Oracle, Weights, settings_for

pytestmark = pytest.mark.slow

PROMPT = list(range(40, 70))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head and a worker, each with CPUs for one engine."""
    with LocalCluster(nodes=2, cpus=2, HF_HUB_OFFLINE="1", XLOOM_API_KEY=API_KEY) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


def write_settings(weights: Weights, folder: Path, port: int, replicas: int) -> Path:
    settings = settings_for(
        weights,
        replicas={"min": replicas, "max": replicas, "cpus": 1.5},
        router={"port": port},
        store={"path": str(folder / "store"), "cache": str(folder / "cache")},
    )
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def url(cluster: LocalCluster, weights: Weights, folder: Path) -> str:
    """The endpoint of a deployment with an engine on each node."""
    port = free_port()
    write_settings(weights, folder, port, replicas=2)
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


def greedy(client: openai.OpenAI, name: str) -> list[int]:
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=TOKENS)
    tokens: list[int] = answer.choices[0].model_extra["token_ids"]
    return tokens


def test_each_node_has_an_engine(url: str) -> None:
    answer = httpx.get(f"{url}/xloom/status", headers={"Authorization": f"Bearer {API_KEY}"}, trust_env=False)
    assert len({replica["node"] for replica in answer.json()["replicas"]}) == 2


def test_the_key_in_the_clusters_environment_is_asked_for(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401


def test_every_model_answers_as_peft_does(url: str, oracle: Oracle) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0) as client:
        for name in ("base", "alpha", "blend"):
            assert greedy(client, name) == oracle(name, tuple(PROMPT), 12)


def test_a_job_deploys_and_leaves_it_serving(
    cluster: LocalCluster, url: str, weights: Weights, folder: Path, oracle: Oracle
) -> None:
    cluster.run("serve", "shutdown", "-y", "-a", cluster.dashboard)
    file = write_settings(weights, folder, free_port(), replicas=1)
    said = cluster.deploy(file)
    served = re.search(r"Serving base, alpha, beta, blend at port (\d+)", said)
    assert served is not None, said
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key=API_KEY, max_retries=0) as client:
        assert greedy(client, "blend") == oracle("blend", tuple(PROMPT), 12)


def test_what_the_chart_renders_is_served(cluster: LocalCluster, url: str, folder: Path) -> None:
    rendering = pytest.importorskip("tests.unit.chart.rendering", reason="Helm's SDK is not installed")
    service = rendering.one(
        rendering.render(rendering.example(rendering.CHART / "examples/values-cpu.yaml")), "RayService"
    )
    # The image's paths become this machine's.
    config = yaml.safe_load(service["spec"]["serveConfigV2"].replace("/opt/xloom/sample", str(SAMPLE)))
    settings, port = config["applications"][0]["args"], free_port()
    settings["router"] = settings.get("router", {}) | {"port": port, "host": "127.0.0.1"}
    settings["store"] = {"path": str(folder / "store"), "cache": str(folder / "cache")}
    file = folder / "chart.yaml"
    file.write_text(yaml.safe_dump(config))
    cluster.run("serve", "deploy", file, "-a", cluster.dashboard)

    def is_ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5, trust_env=False).status_code == 200
        return False

    wait_until(is_ready, 400, "the chart's deployment", 0.5)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=API_KEY, max_retries=0) as client:
        answer = client.chat.completions.create(
            model="blend", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 1
