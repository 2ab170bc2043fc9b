"""What probes and scrapers ask, without a key."""

from __future__ import annotations

import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from xloom.router.draining import folder_of

from ..served import Served

GAUGES = ("running", "waiting", "kv_pages_used", "kv_pages_total")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_key(server: Served, path: str) -> None:
    assert httpx.get(server.url + path, trust_env=False, timeout=30).status_code == 200


def test_ready_counts_the_replicas_that_can_answer(server: Served) -> None:
    assert server.http.get("/ready").json() == {"ready": True, "replicas": 1}


def test_metrics_show_the_engine_the_replicas_and_the_router(server: Served) -> None:
    def scrape() -> dict[str, list[tuple[dict[str, str], float]]]:
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in families:
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return samples

    def generated(samples: dict[str, list[tuple[dict[str, str], float]]]) -> float:
        return sum(value for _, value in samples["vllm:generation_tokens_total"])

    before = generated(scrape())
    server.greedy("blend", list(range(50, 90)), 10)
    server.wait_idle()
    samples = scrape()
    assert generated(samples) - before == 10

    [replica] = server.status()["replicas"]
    for name in GAUGES:
        assert samples[f"xloom_replica_{name}"] == [({"replica": replica["id"]}, replica["stats"][name])]
    assert samples["xloom_router_in_flight"] == [({}, 0.0)]


def test_a_router_that_is_asked_to_drain_says_so_until_it_is_no_longer(server: Served) -> None:
    """What the script before a Kubernetes pod's end does: helm/xloom/files/drain.sh."""
    folder = folder_of(httpx.URL(server.url).port or 0)
    pid, *others = [each for each in folder.iterdir() if each.name.isdigit()]

    def until(*, drains: bool) -> httpx.Response:
        deadline = time.monotonic() + 30
        while True:
            answer = httpx.get(f"{server.url}/ready", trust_env=False, timeout=30)
            closes = answer.headers.get("connection") == "close"
            if (answer.status_code == 503) is closes is drains and pid.exists() is not drains:
                return answer
            assert time.monotonic() < deadline, answer.text

    assert others == []
    (folder / "drain").touch()
    try:
        assert until(drains=True).json()["error"]["code"] == "router_closing"
        assert server.greedy("base", list(range(50, 60)), 4)  # what still comes is answered
    finally:
        (folder / "drain").unlink()
    assert until(drains=False).status_code == 200
