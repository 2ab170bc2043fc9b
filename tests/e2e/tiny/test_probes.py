"""What probes and scrapers ask, without a key."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

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
