"""Pairs in vLLM's own scheduler, without a model: random arrivals, budgets, pages and aborts.

What the runner would do is played by a few lines that know which gates exist, and fail where a token is computed
without its gates or before it is known.
"""

from __future__ import annotations

import copy
import json
import os
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.models import tiny_model
from xloom.mixtures.single_pass import LONGEST, segment_end
from xloom.vllm.plugin.pairs import PROMPT_ARG, GateSource, is_scaling, mixture_id, source_of
from xloom.vllm.plugin.scheduler import AsyncMixtureScheduler, MixtureScheduler

PAGE, MODEL_LEN = 16, 128
FOLDERS: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("scheduler")
    FOLDERS["model"] = tiny_model(root / "model", "llama")
    bundles = {
        "blend": (0.0, 2, "exact"), "other": (0.0, 2, "exact"), "constant": (0.5, 2, "exact"),
        "single": (0.0, 1, "exact"), "single-constant": (0.5, 1, "exact"), "lagged": (0.0, 1, "lagged"),
    }  # fmt: skip
    for name, source in bundles.items():
        FOLDERS[name] = root / name
        FOLDERS[name].mkdir()
        routing = dict(zip(GateSource._fields, source, strict=True))
        (FOLDERS[name] / "xlora.json").write_text(json.dumps({"format": 1, "adapter_names": ["0"], "routing": routing}))
    FOLDERS["adapter"] = root / "adapter"
    FOLDERS["adapter"].mkdir()
    init_none_hash(sha256)


@cache
def plain_config() -> VllmConfig:
    return EngineArgs(
        model=str(FOLDERS["model"]), max_model_len=MODEL_LEN, enable_lora=True, max_loras=2, block_size=32,
        skip_tokenizer_init=True, max_num_batched_tokens=256, max_num_seqs=16, kv_cache_memory_bytes=1 << 20,
    ).create_engine_config()  # fmt: skip


def make_scheduler(
    *, asynchronous: bool, policy: str, pages: int, budget: int, limit: int, max_loras: int = 2, threshold: int = 0
) -> Any:
    config = copy.deepcopy(plain_config())
    config.cache_config.num_gpu_blocks, config.cache_config.block_size = pages, PAGE
    config.cache_config.enable_prefix_caching = True
    config.lora_config.max_loras = max_loras
    scheduler = config.scheduler_config
    scheduler.policy, scheduler.async_scheduling = policy, asynchronous
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = budget, 2 * limit
    scheduler.max_num_scheduled_tokens, scheduler.long_prefill_token_threshold = None, threshold
    scheduler.enable_chunked_prefill = True
    config.additional_config = {"xloom": {"max_num_seqs": limit}}
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache_config = KVCacheConfig(
        num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    kind = AsyncMixtureScheduler if asynchronous else MixtureScheduler
    return kind(config, cache_config, StructuredOutputManager(config), block_size=PAGE, log_stats=True)


@dataclass
class Played:
    """A model runner that only keeps count. One step at a time, or with one step ahead of its results."""

    scheduler: Any
    depth: int
    gates: dict[str, set[int]] = field(default_factory=dict)  # request -> positions that have gates, unused
    computed: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # request -> sampled, seen by the scheduler
    cached: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    ahead: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = field(default_factory=deque)

    def step(self) -> int:
        """Schedule and run one step, then take in what is due. The number of tokens scheduled."""
        output = self.scheduler.schedule()
        scheduled = output.total_num_scheduled_tokens
        result = self._run(output)
        self.ahead.append((output, result))
        while self.ahead and (len(self.ahead) >= self.depth or not scheduled):
            self._take(*self.ahead.popleft())
        return scheduled

    def drain(self) -> None:
        while self.ahead:
            self._take(*self.ahead.popleft())

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        scheduler, counts = self.scheduler, output.num_scheduled_tokens
        new = {each.req_id: each for each in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts = {name: each.num_computed_tokens for name, each in new.items()}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        again = set(new) | cached.resumed_req_ids
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            owner = mixture_id(name)
            ended = name in output.finished_req_ids
            if name == owner if ended else (owner not in counts or owner in again):
                self.gates.pop(owner, None)
        sampled: dict[str, list[int]] = {}
        made: dict[str, set[int]] = {}
        for name, count in counts.items():
            start = starts[name]
            # A scaling sequence that has computed its prompt is gone by now.
            request = scheduler.requests.get(name) or scheduler.pairs[mixture_id(name)].scaling
            on_its_way = request.num_output_placeholders
            if is_scaling(name) and request.mixture.num_stale_output_tokens:
                on_its_way = 1  # its request was preempted later in this very step, and its token comes all the same
            assert start + count <= request.num_tokens + on_its_way
            if name not in again:
                assert start == self.computed[name]
            self.computed[name] = start + count
            positions = set(range(start, start + count))
            if is_scaling(name):
                made[mixture_id(name)] = positions
            elif (source := source_of(request.lora_request)) is not None:
                waiting = self.gates.get(name, set())
                if source.prefill == "lagged":
                    waiting = waiting | {0}
                assert positions <= waiting, f"{name} computes {sorted(positions - waiting)} without gates"
                self.gates[name] = waiting - positions
                if source.routing_passes == 1:
                    end, sent = start + count, request.num_client_tokens
                    begins = end >= sent if source.prefill == "exact" else segment_end(end - 1, sent, "lagged") == end
                    if begins:
                        made[name] = set(range(end, segment_end(end, sent, source.prefill)))
            sampled[name] = [] if request.is_prefill_chunk else [7]
        for owner, positions in made.items():
            kept = self.gates.setdefault(owner, set())
            assert not kept & positions
            kept |= positions
            assert len(kept) <= 2 * scheduler.max_num_scheduled_tokens + LONGEST  # what gates may take
        names = list(counts)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
        )

    def _take(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(output, result).values():
            for each in outputs.outputs:
                assert not is_scaling(each.request_id)
                self.tokens[each.request_id] = self.tokens.get(each.request_id, 0) + len(each.new_token_ids)
                if each.prefill_stats is not None:
                    self.cached[each.request_id] = each.prefill_stats.num_cached_tokens
                if each.finish_reason is not None:
                    self.ended[each.request_id] = str(each.finish_reason)


def made_request(name: str, kind: str, prompt: list[int], new: int, sent: int | None = None, **options: Any) -> Request:
    lora = None
    if kind != "base":
        number = list(FOLDERS).index(kind)
        lora = LoRARequest(lora_name=f"{kind}@1", lora_int_id=number, lora_path=str(FOLDERS[kind]))
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(
            max_tokens=new, ignore_eos=True, extra_args=None if sent is None else {PROMPT_ARG: sent}
        ),
        pooling_params=None,
        lora_request=lora,
        block_hasher=get_request_block_hasher(PAGE, sha256),
        **options,
    )


@pytest.mark.parametrize(("kind", "shared"), [("blend", 3 * PAGE), ("single", PAGE), ("lagged", 0)])
def test_in_one_pass_pages_of_an_answer_are_nobodys_prompt(kind: str, shared: int) -> None:
    scheduler = make_scheduler(asynchronous=False, policy="fcfs", pages=40, budget=256, limit=4)
    played = Played(scheduler, depth=1)

    def run(request: Request) -> Request:
        scheduler.add_request(request)
        while request.request_id not in played.ended:
            played.step()
        return request

    first = run(made_request("first", kind, list(range(PAGE + 2)), 3 * PAGE))
    dialogue = [*first.all_token_ids[: 3 * PAGE], 1, 2]
    run(made_request("base", "base", dialogue, 1))  # the base model's pages of the same tokens are there
    run(made_request("again", kind, dialogue, 1))
    assert played.cached["again"] == shared


class Pairs(RuleBasedStateMachine):
    """Requests come and go; whatever the order, all come to their end and nothing is left."""

    @initialize(
        asynchronous=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        pages=st.integers(18, 60),
        budget=st.sampled_from([16, 24, 40, 256]),
        limit=st.integers(1, 6),
        max_loras=st.integers(1, 2),
        threshold=st.sampled_from([0, 8]),
    )
    def begin(self, asynchronous: bool, **options: Any) -> None:
        self.limit, self.count = options["limit"], 0
        self.scheduler = make_scheduler(asynchronous=asynchronous, **options)
        self.played = Played(self.scheduler, depth=2 if asynchronous else 1)
        self.wanted: dict[str, int] = {}
        self.still = 0

    @rule(
        kind=st.sampled_from(
            ["base", "adapter", "blend", "blend", "other", "constant", "single", "single", "single-constant", "lagged"]
        ),
        prefix=st.sampled_from([0, 0, 16, 33, 50]),
        own=st.integers(1, 40),
        new=st.integers(1, 25),
        priority=st.integers(0, 2),
        generated=st.sampled_from([0, 0, 0, 5]),
    )
    def arrive(self, kind: str, prefix: int, own: int, new: int, priority: int, generated: int) -> None:
        self.count += 1
        name = f"r{self.count}"
        prompt = [3] * prefix + [1000 * self.count + place for place in range(own)]
        sent = max(1, len(prompt) - generated)
        request = made_request(name, kind, prompt, new, sent, arrival_time=float(self.count), priority=priority)
        self.wanted[name] = min(new, MODEL_LEN - len(prompt))
        self.scheduler.add_request(request)

    @precondition(lambda self: bool(self.live()))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live())))
        ended = self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        assert [request.request_id for request in ended] == [name]
        self.played.ended[name] = "abort"

    @precondition(lambda self: bool(self.live()))
    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.one_step()

    def live(self) -> set[str]:
        return set(self.wanted) - set(self.played.ended)

    def one_step(self) -> None:
        in_flight = bool(self.played.ahead)
        scheduled = self.played.step()
        # Every step does something while work is left; one may wait for results that are on their way.
        assert scheduled or in_flight or not self.live()
        running, waiting = self.scheduler.get_request_counts()
        assert running <= self.limit
        assert running + waiting == len(self.live())
        slots = {r.lora_request.lora_int_id for r in self.scheduler.running if r.lora_request is not None}
        assert len(slots) <= self.scheduler.lora_config.max_loras

    @invariant()
    def pairs_are_whole(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for name, mixture in self.scheduler.pairs.items():
            assert self.scheduler.requests[name] is mixture
            assert self.scheduler.requests.get(mixture.scaling.request_id) is (
                None if name in self.scheduler._alone else mixture.scaling
            )
            assert name not in self.scheduler._alone or mixture.prompt_is_scaled

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(4000):
            if not self.live():
                break
            self.one_step()
        self.played.drain()
        assert not self.live()
        for name, ending in self.played.ended.items():
            if ending != "abort":
                assert (ending, self.played.tokens[name]) == ("length", self.wanted[name])
        self.scheduler.schedule()
        scheduler = self.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        left = (scheduler.requests, scheduler.pairs, scheduler.running, scheduler._parked, scheduler._alone)
        assert [len(each) for each in (*left, scheduler._half_preempted, scheduler._hits)] == [0] * 7
        assert (len(scheduler.waiting), len(scheduler.kv_holding_waiting)) == (0, 0)
        assert scheduler.reset_prefix_cache()


Pairs.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate] if os.environ.get("CI") else list(Phase),
)
TestPairs = Pairs.TestCase
