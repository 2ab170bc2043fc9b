"""vLLM's own metrics as they go to Ray: request figures from the router, scheduler figures from the replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from tests.fakes import FakeBackend, until
from tests.models import tiny_model
from xloom.observability import table
from xloom.observability.recorder import RECORDER, Recorder
from xloom.observability.table import Kind, Metric
from xloom.protocol import TokenChunk, TokenRequest
from xloom.replica.server import ReplicaServer
from xloom.router.directory import ReplicaInfo
from xloom.router.dispatch import Dispatcher
from xloom.router.traffic import Traffic
from xloom.settings import Settings, parse_settings
from xloom.vllm.front_end.core_client import RoutedCoreClient
from xloom.vllm.front_end.engine_client import RoutedEngineClient, front_end_config
from xloom.vllm.metrics import LEFT_OUT, RequestStatLogger, SchedulerStatLogger, ScrapedStatLogger

pytestmark = pytest.mark.timeout(300)


def value(name: str, kind: Kind, room: str, *more: str) -> float:
    """What our recorder holds of a metric of vLLM's; `more` are the labels it has beside engine and model."""
    labels = ("model_name", "engine", *more, "ReplicaId", "room")
    return RECORDER.value(Metric(name, kind, room, "", labels), room=room, model_name="sample")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = tiny_model(tmp_path_factory.mktemp("metrics") / "base", "llama")
    data = {"model": {"source": str(model), "served_name": "sample"}, "engine": {"max_model_len": 256}}
    return parse_settings(data, with_keys=False)


class Router:
    """A router's engine client over one replica with a fake engine."""

    def __init__(self, settings: Settings, backend: FakeBackend | None = None) -> None:
        self.recorder, self.backend = Recorder(), backend or FakeBackend(step_s=0.001)
        self.server = ReplicaServer(self.backend, "one", "secret")
        self.infos: list[ReplicaInfo] = []
        traffic = Traffic(self.recorder, settings.model.served_name)
        self.dispatcher = Dispatcher(self._discover, "secret", "router", traffic=traffic)
        self.engine = RoutedEngineClient(front_end_config(settings), RoutedCoreClient(self.dispatcher))

    async def _discover(self) -> list[ReplicaInfo]:
        return self.infos

    async def start(self) -> None:
        self.infos = [ReplicaInfo("one", "node", *await self.server.start("127.0.0.1"), 1)]
        self.dispatcher.start()

    async def generate(self, request_id: str, **sampling: Any) -> str:
        text = ""
        options = {"output_kind": RequestOutputKind.DELTA, "ignore_eos": True, "skip_special_tokens": False}
        prompt = {"prompt_token_ids": [5, 6, 7]}
        async for output in self.engine.generate(prompt, SamplingParams(**options, **sampling), request_id):
            text += output.outputs[0].text
        return text

    async def close(self) -> None:
        await self.dispatcher.close()
        await self.server.close()
        self.engine.shutdown()


@pytest.fixture
async def router(settings: Settings) -> AsyncIterator[Router]:
    made = Router(settings)
    await made.start()
    yield made
    await made.close()


async def test_a_router_tells_of_requests_to_both_exporters(router: Router) -> None:
    kinds = {type(each) for each in router.engine.logger_manager.stat_loggers}
    assert kinds >= {ScrapedStatLogger, RequestStatLogger}
    assert PrometheusStatLogger not in kinds
    before = value("vllm_generation_tokens", "counter", "router")
    await router.generate("r1", max_tokens=6)
    await asyncio.sleep(0)  # the last step is recorded after its tokens are handed out
    assert value("vllm_generation_tokens", "counter", "router") - before == 6
    assert value("vllm_time_to_first_token_seconds", "histogram", "router") >= 1
    assert value("vllm_inter_token_latency_seconds", "histogram", "router") >= 5
    assert value("vllm_e2e_request_latency_seconds", "histogram", "router") >= 1
    assert value("vllm_request_success", "counter", "router", "finished_reason") >= 1
    plain = REGISTRY.get_sample_value("vllm:generation_tokens_total", {"engine": "0", "model_name": "sample"})
    assert plain is not None
    assert plain >= 6


async def test_a_router_is_silent_on_what_only_replicas_know(router: Router) -> None:
    await router.generate("r1", max_tokens=3)
    for name in ("vllm_num_requests_running", "vllm_num_requests_waiting", "vllm_kv_cache_usage_perc"):
        assert value(name, "gauge", "router") == 0
    assert value("vllm_iteration_tokens_total", "histogram", "router") == 0


class Delayed(FakeBackend):
    """Says of each request's first chunk that it waited 2 s, was preempted once, and found 2 tokens in the cache."""

    def _next(self, request: TokenRequest) -> TokenChunk:
        chunk = super()._next(request)
        if len(self.tokens.get(request.request_id, ())) == len(request.prompt_token_ids) + 1:
            chunk.queued_us, chunk.preemptions, chunk.num_cached_tokens = 2_000_000, 1, 2
        return chunk


async def test_metrics_of_a_router_are_right_or_left_out(settings: Settings) -> None:
    router = Router(settings, Delayed(step_s=0.001))
    await router.start()
    try:
        await router.generate("r1", max_tokens=3)
        await until(lambda: sample("prefix_cache_queries_total") > 0)  # with the replica's next report
        assert sample("prefix_cache_queries_total") == 3
        assert sample("prefix_cache_hits_total") == sample("prompt_tokens_cached_total") == 2
        assert sample("num_preemptions_total") == sample("request_num_preemptions_sum") == 1
        assert sample("request_queue_time_seconds_sum") == pytest.approx(2)
        exported = {sample.name for metric in REGISTRY.collect() for sample in metric.samples}
        assert not {name for name in exported if name.startswith(tuple(LEFT_OUT | {"vllm:cache_config_info"}))}
    finally:
        await router.close()


def sample(name: str) -> float:
    """What /metrics has of a metric of vLLM's."""
    found = REGISTRY.get_sample_value(f"vllm:{name}", {"engine": "0", "model_name": "sample"})
    assert found is not None, name
    return found


async def test_a_stop_string_is_a_stop_and_a_client_that_leaves_an_abort(router: Router) -> None:
    text = await router.generate("r1", max_tokens=12)
    assert router.recorder.value(table.REQUESTS, outcome="length") == 1
    await router.generate("r2", max_tokens=12, stop=[text[len(text) // 2 : len(text) // 2 + 2]])
    assert router.recorder.value(table.REQUESTS, outcome="stop") == 1
    router.backend.step_s = 0.05
    before = router.recorder.value(table.GENERATION_TOKENS)
    leaving = asyncio.create_task(router.generate("r3", max_tokens=200))
    async with asyncio.timeout(60):
        while router.recorder.value(table.GENERATION_TOKENS) == before:
            await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert router.recorder.value(table.REQUESTS, outcome="abort") == 1
    assert router.recorder.value(table.REQUESTS) == 3


def test_a_replica_tells_of_its_scheduler(settings: Settings) -> None:
    logger = SchedulerStatLogger(front_end_config(settings))
    logger.log_engine_initialized()
    cache = PrefixCacheStats(requests=2, queries=64, hits=32)
    logger.take(SchedulerStats(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.25, prefix_cache_stats=cache))
    logger.take(SchedulerStats(num_running_reqs=1, kv_cache_usage=0.125))
    assert value("vllm_num_requests_running", "gauge", "replica") == 1
    assert value("vllm_num_requests_waiting", "gauge", "replica") == 0
    assert value("vllm_kv_cache_usage_perc", "gauge", "replica") == 0.125
    assert value("vllm_prefix_cache_queries", "counter", "replica") == 64
    assert value("vllm_prefix_cache_hits", "counter", "replica") == 32
    assert value("vllm_generation_tokens", "counter", "replica") == 0  # requests are the router's


def test_a_replica_tells_how_long_requests_queued_and_were_computed(settings: Settings) -> None:
    logger = SchedulerStatLogger(front_end_config(settings))
    queued, scheduled = EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED
    events = [(queued, 10.0), (scheduled, 12.5), (EngineCoreEventType.PREEMPTED, 13.0), (scheduled, 14.0)]
    first = EngineCoreOutput("a", [7], events=[EngineCoreEvent(*each) for each in events])
    later = EngineCoreOutput("b", [7], events=[EngineCoreEvent(scheduled, 14.0)])  # it had its first before
    logger.began(EngineCoreOutputs(outputs=[first, later, EngineCoreOutput("c", [7])], timestamp=15.5))
    for name, seconds in (("queue", 2.5), ("prefill", 3.0)):
        histogram = getattr(logger, f"histogram_{name}_time_request")[0]
        assert (histogram.count, histogram.sum) == (1, seconds)
