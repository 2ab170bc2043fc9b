"""What Ray's exporter shows of our metrics: names, labels and values, scraped as Prometheus would."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from cluster.local_cluster import free_port
from tests.models import ATTENTION, tiny_adapter, tiny_model
from xloom.adapters.client import StoreClient, open_store
from xloom.observability.table import METRICS, Metric
from xloom.protocol import XloomError

from .metrics_writers import MetricsWriters, Pressed

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
Samples = dict[str, list[tuple[dict[str, str], float]]]
# X-LoRA's figures come from a real engine: tests of the mixture have them.
EMITTED = [metric for metric in METRICS if not metric.name.startswith("xloom_xlora_")]


@pytest.fixture(scope="module")
def exporter() -> Iterator[str]:
    """A Ray of its own; yields the address of its metrics."""
    folder, port = tempfile.mkdtemp(prefix="xm", dir="/tmp"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the actor's process imports the fakes
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=port,
            log_to_driver=False,
            configure_logging=False,
        )
        processes = ray._private.worker._global_node.all_processes.values()
        started = [info.process for infos in processes for info in infos]
        yield f"http://127.0.0.1:{port}/metrics"
        ray.shutdown()
        for process in started:  # Ray leaves them to the garbage collector, which warns of those it finds running
            process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def samples(exporter: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    """All samples, once everything that is counted has happened and been exported."""
    folder = tmp_path_factory.mktemp("metrics")
    writers = ray.remote(num_cpus=0)(MetricsWriters).remote()
    store = asyncio.run(_fill_and_serve(folder, writers))
    _scale()
    deadline = time.monotonic() + 120
    while True:
        found = scrape(exporter)
        missing = {name for metric in EMITTED for name in exported(metric)} - set(found)
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    yield found
    serve.shutdown()
    store.stop()
    ray.kill(writers)


async def _fill_and_serve(folder: Path, writers: ray.actor.ActorHandle) -> StoreClient:
    base = tiny_model(folder / "base", "llama")
    code = tiny_adapter(folder / "code", base, rank=4, targets=ATTENTION)
    docs = tiny_adapter(folder / "docs", base, rank=4, targets=ATTENTION, seed=3)
    store = await open_store(str(folder / "store"), str(base), reserved_names=["base"])
    entry = await store.add("code", str(code))
    await store.add("docs", str(docs))
    with pytest.raises(XloomError):
        await store.add("code", str(docs))
    with pytest.raises(XloomError):
        await store.remove("none")
    await writers.live.remote(store, str(folder / "node"), entry.ref)
    await store.fetch(entry.generation)
    await store.fetch(entry.generation)
    await store.remove("docs")
    return store


def _scale() -> None:
    """The policy in Serve's own controller, over a deployment that it scales up."""
    policy = {
        "policy_function": "xloom.autoscaling.policy:QueueAndPagesPolicy",
        "policy_kwargs": {"target_queue_depth": 8, "target_kv_occupancy": 0.8},
    }
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1.0,
        "upscale_delay_s": 0.5,
        "policy": policy,
    }
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(Pressed, ray_actor_options={"num_cpus": 0}, autoscaling_config=scaling)
    serve.run(deployment.bind(), route_prefix=None, blocking=False)


def scrape(address: str) -> Samples:
    found: Samples = {}
    try:
        text = httpx.get(address, trust_env=False, timeout=30).text
    except httpx.HTTPError:  # the agent is starting, or busy
        return found
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def exported(metric: Metric) -> list[str]:
    """The names of its series."""
    suffixes = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
    return [metric.exported + suffix for suffix in suffixes]


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for held, value in samples[name] if labels.items() <= held.items())


@pytest.mark.parametrize("metric", EMITTED, ids=lambda metric: metric.name)
def test_a_scrape_shows_the_name_and_labels_of_the_table(samples: Samples, metric: Metric) -> None:
    for name in exported(metric):
        assert name in samples
        for labels, _ in samples[name]:
            assert set(metric.labels) <= set(labels)


def test_no_name_is_shown_that_the_table_lacks(samples: Samples) -> None:
    known = {name for metric in METRICS for name in exported(metric)}
    assert {name for name in samples if name.startswith("ray_xloom_")} <= known


def test_counters_and_gauges_have_their_values(samples: Samples) -> None:
    assert total(samples, "ray_xloom_requests_total", outcome="length") == 2
    assert total(samples, "ray_xloom_generation_tokens_total", model="code", kind="lora") == 5
    assert total(samples, "ray_xloom_generation_tokens_total", model="base", kind="base") == 5
    assert total(samples, "ray_xloom_cached_prompt_tokens_total") == 2  # once a request
    assert total(samples, "ray_xloom_replays_total", reason="replica_lost") >= 1
    assert total(samples, "ray_xloom_http_errors_total", status="404", code="model_not_found") == 1
    assert total(samples, "ray_xloom_router_in_flight") == 0
    assert total(samples, "ray_xloom_store_changes_total", action="add", outcome="adapter_exists") == 1
    assert total(samples, "ray_xloom_store_changes_total", action="remove", outcome="adapter_not_found") == 1
    assert total(samples, "ray_xloom_adapter_swaps_total", action="load") == 4  # two adapters on two replicas
    assert total(samples, "ray_xloom_node_cache_reads_total", outcome="miss") == 2
    assert total(samples, "ray_xloom_preemptions_total", replica="one") == 2
    assert total(samples, "ray_xloom_autoscaling_decisions_total", direction="up", reason="queue") == 1
    assert total(samples, "ray_xloom_autoscaling_pressure_ratio", signal="queue") == 2.5


def test_histograms_have_cumulative_buckets_and_an_exact_sum(samples: Samples) -> None:
    name = "ray_xloom_request_seconds"
    labels = {"model": "code", "kind": "lora"}
    buckets = [(held["le"], value) for held, value in samples[f"{name}_bucket"] if labels.items() <= held.items()]
    assert dict(buckets)["+Inf"] == total(samples, f"{name}_count", **labels) == 1
    ordered = sorted((float(bound), value) for bound, value in buckets)
    assert [value for _, value in ordered] == sorted(value for _, value in ordered)
    spent = total(samples, f"{name}_sum", **labels)
    assert [value for bound, value in ordered if bound >= spent] == [1] * sum(bound >= spent for bound, _ in ordered)
    assert not any(re.fullmatch(f"{name}(_total|_created)?", held) for held in samples)
