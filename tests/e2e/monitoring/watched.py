"""A Ray cluster of two nodes that serves the sample, with Prometheus at it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.local_cluster import LocalCluster, free_port
from xloom.settings import load_settings

from ..served import ADMIN_KEY, API_KEY, START_S, wait_until
from .adapters import write_adapter
from .prometheus import RULES, SCRAPE_S, Prometheus, configuration
from .traffic import Endpoint

DISCOVERY = "prom_metrics_service_discovery.json"  # ray._private.ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE, 2.60
DISCOVERY_S = 60.0
SCRAPED_S = 60.0
TOO_WIDE = 72  # a rank that the store takes and engines with `max_lora_rank: 64` refuse
# Few sequences and pages (40 of 32 tokens), so that a dozen streams make a queue and preemptions; a drain of no time,
# so that a replica that is scaled away leaves requests behind, which go on elsewhere.
SMALL: dict[str, Any] = {
    "observability": {"logs": {"format": "json", "requests": True}},
    "engine": {
        "compile": False,
        "max_model_len": 608,  # a pair of that length takes 39 of the pages
        "max_num_seqs": 8,
        "max_adapters": 8,
        "max_lora_rank": 64,
        "paged_attention": {"max_blocks": 80},
    },
    "replicas": {
        "min": 1,
        "max": 2,
        "cpus": 1.5,
        "target_queue_depth": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "drain_timeout_s": 0,
    },
}


@dataclass(frozen=True)
class Watched:
    """What runs, and since when (seconds since the epoch)."""

    cluster: LocalCluster
    endpoint: Endpoint
    prometheus: Prometheus
    started: float

    @property
    def discovery(self) -> Path:
        """The file that Ray writes for Prometheus."""
        return self.cluster.folder / DISCOVERY

    def wait_replicas(self, count: int, timeout_s: float = START_S) -> None:
        """Wait until so many replicas are connected and take requests."""

        def are_there() -> bool:
            replicas = self.endpoint.replicas()
            return len(replicas) == count and all(each["state"] == "ready" for each in replicas)

        wait_until(are_there, timeout_s, f"{count} replicas: {self.endpoint.replicas()}", 0.25)

    def wait_preempted(self) -> None:
        """Wait until an engine has taken pages from a request."""

        def is_so() -> bool:
            return any(each["stats"]["preemptions"] for each in self.endpoint.replicas())

        wait_until(is_so, START_S, "a preemption", 0.25)

    def kill_busy(self) -> None:
        """Kill a replica that has requests."""

        def is_killed() -> bool:
            for each in self.endpoint.replicas():
                if each["state"] == "ready" and each["stats"]["running"]:
                    os.kill(each["pid"], signal.SIGKILL)
                    return True
            return False

        wait_until(is_killed, START_S, "a replica with requests", 0.25)

    def wait_seen(self, expression: str) -> None:
        """Wait until an expression has had a value since the start, as Prometheus sees it."""
        wait_until(
            lambda: self.prometheus.between(expression, self.started, time.time()) != [], START_S, expression, 0.5
        )


def sample_settings(folder: Path, port: int, sections: dict[str, Any]) -> Path:
    """The sample's settings file, with these sections instead of its own."""
    sample = load_settings(None, with_keys=False).model_dump(include={"model", "adapters", "xlora"}, exclude_none=True)
    sample["adapters"].append({"name": "wide", "source": str(write_adapter(folder / "wide", TOO_WIDE))})
    stores = {"path": str(folder / "store"), "cache": str(folder / "cache"), "sources": ["/"]}
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(sample | {"router": {"port": port}, "store": stores} | sections))
    return file


@contextmanager
def watched(
    folder: Path, sections: dict[str, Any], *, scrape_s: int = SCRAPE_S, export_ms: int = 1000
) -> Iterator[Watched]:
    """Start all of it; `sections` are settings. Ray exports, and Prometheus scrapes, every so often."""
    ports = {name: str(free_port()) for name in ("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT")}
    quick = {
        "RAY_metrics_report_interval_ms": str(export_ms),
        "RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S": str(export_ms / 1000),
        "REPORTER_UPDATE_INTERVAL_MS": str(export_ms),
        "HF_HUB_OFFLINE": "1",
    }
    keys = {"XLOOM_API_KEY": API_KEY, "XLOOM_ADMIN_KEY": ADMIN_KEY}
    port = free_port()
    with LocalCluster(nodes=2, cpus=2, **ports, **quick, **keys) as cluster, contextlib.ExitStack() as ending:
        discovery = cluster.folder / DISCOVERY
        wait_until(discovery.exists, DISCOVERY_S, "Ray's discovery file", 0.2)
        rules = RULES if RULES.exists() else None
        configured = configuration(discovery, f"127.0.0.1:{port}", rules, scrape_s)
        prometheus = ending.enter_context(Prometheus(folder, configured))
        started = time.time()
        cluster.deploy(sample_settings(folder, port, sections))
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        ending.callback(endpoint.close)
        made = Watched(cluster, endpoint, prometheus, started)
        made.wait_replicas(1)
        wait_until(lambda: all_up(prometheus, discovery), SCRAPED_S, "every target scraped", 0.5)
        yield made


def all_up(prometheus: Prometheus, discovery: Path) -> bool:
    """Whether all that Ray names, and the router, have been scraped."""
    addresses = [target for group in json.loads(discovery.read_text()) for target in group["targets"]]
    with contextlib.suppress(httpx.TransportError):
        found = prometheus.targets()
        nodes = [url for url, health in found.items() if health == "up"]
        return len(nodes) >= 3 and len(found) == len(addresses) + 1
    return False
