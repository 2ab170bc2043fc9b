"""vLLM's scheduler with pairs: a mixture's request and its scaling sequence are admitted, preempted and ended as one.

- The scaling sequence waits in vLLM's queue, and is let in when there is room for both. Its request is *parked*: in no
  queue, until gates are there. Then it comes before all that wait, and takes pages from younger requests if it must.
- Neither computes a token too early: the request waits for gates, the scaling sequence for the token sampled last.
- Decoding pairs take turns together, so that every other step is one of the base model alone.

All other requests go through vLLM's own code; without pairs nothing here is on their path but a look at a dictionary.

Relies on vLLM 0.32, `vllm.v1.core.sched.scheduler.Scheduler`: the methods overridden here, that `schedule` asks
`_reserve_prefill_lookahead` last for a request's number of tokens, running or waiting, drains `kv_holding_waiting`
first, and stops admitting at `max_num_active_reqs`. tests/integration/test_vllm_seams.py holds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from xloom.vllm.plugin import GATES
from xloom.vllm.plugin.gate_records import GateRecords
from xloom.vllm.plugin.hits import PairHits
from xloom.vllm.plugin.pairs import (
    MixtureRequest,
    ScalingRequest,
    SinglePassRequest,
    is_scaling,
    mixture_id,
    mixture_request,
    running,
    source_of,
)
from xloom.vllm.plugin.turns import Turns

LIMIT = "max_num_seqs"  # in VllmConfig.additional_config["xloom"]: requests; vLLM's own counts rows


def limit_of(config: VllmConfig) -> int:
    """How many requests may run at once."""
    scheduler = config.scheduler_config
    given = (config.additional_config or {}).get("xloom", {}).get(LIMIT, scheduler.max_num_seqs)
    return int(min(given, scheduler.max_num_active_seqs or scheduler.max_num_seqs))


class PairScheduling(Scheduler):
    """Mixed into vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pairs: dict[str, MixtureRequest] = {}  # by the request's id
        self._parked: dict[str, MixtureRequest] = {}  # whose scaling sequence runs, and they do not yet
        self._mixing: set[str] = set()  # of which both halves run
        self._alone: set[str] = set()  # whose scaling sequence has ended
        self._half_preempted: set[str] = set()
        self.pair_preemptions = 0
        self._turns = Turns()
        self._hits = PairHits(self.kv_cache_manager, self.block_size)
        self._gates = GateRecords()
        self._loras: set[int] = set()  # that running requests need, with those of pairs let in
        self._starved: list[str] = []  # that found no pages in the last step
        # Requests; vLLM's max_num_seqs is the number of rows, of which a pair takes two.
        self._limit = limit_of(self.vllm_config)
        record = self.kv_cache_manager.record_prefix_cache_stats
        self.kv_cache_manager.record_prefix_cache_stats = lambda request, hits: (
            None if isinstance(request, ScalingRequest) else record(request, hits)
        )

    # Arrival and end.

    def add_request(self, request: Request) -> None:
        self._gates.begin(request)
        source = source_of(request.lora_request)
        if request.request_id in self.requests or source is None:
            super().add_request(request)
            return
        mixture = mixture_request(request, source, self.hash_block_size)
        super().add_request(mixture)
        if isinstance(mixture, SinglePassRequest):
            return
        self._withdraw(mixture)
        self.pairs[mixture.request_id] = mixture
        super().add_request(mixture.scaling)

    def _withdraw(self, mixture: MixtureRequest) -> None:
        """Take a request out of the queues: its scaling sequence waits for it."""
        for queue in (self.waiting, self.kv_holding_waiting):
            queue.remove_requests([mixture])
        self.deferred_waiting.discard(mixture)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        if request_ids is None:  # all; scaling sequences end with their requests
            request_ids = [name for name in self.requests if not is_scaling(name)]
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        return ended

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._gates.drop(request.request_id)
        if isinstance(request, MixtureRequest) and self.pairs.pop(request.request_id, None) is not None:
            self._parked.pop(request.request_id, None)
            self._mixing.discard(request.request_id)
            self._alone.discard(request.request_id)
            self._half_preempted.discard(request.request_id)
            self._hits.release(request.request_id)
            super().finish_requests(request.scaling.request_id, RequestStatus.FINISHED_ABORTED)
        freed = super()._free_request(request, *args, **kwargs)
        if self.finished_req_ids_dict is not None and isinstance(request, ScalingRequest):
            self.finished_req_ids_dict[request.client_index].discard(request.request_id)
        return freed

    # A step.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if not self.pairs:
            self.max_num_active_reqs = self._limit
            return super().schedule(throttle_prefills)
        self._finish_preemptions()
        self._wake_parked()
        allowed = self._limit + len(self._mixing) + len(self.kv_holding_waiting)
        self.max_num_active_reqs = min(allowed, self.max_num_running_reqs)
        self._loras = self._loras_in_use()
        self._turns.choose(self.pairs[each] for each in self._mixing)
        before = {mixture.request_id for mixture in self.kv_holding_waiting if isinstance(mixture, MixtureRequest)}
        output = super().schedule(throttle_prefills)
        self._starved = [each for each in before if each not in output.num_scheduled_tokens]
        self._look_at_admitted(output)
        self._end_scaling()
        return output

    def _end_scaling(self) -> None:
        """With routing in one pass: scaling sequences that have made all gates of the prompt have done their work."""
        for request_id in [each for each in self._mixing if self.pairs[each].prompt_is_scaled]:
            self._mixing.discard(request_id)
            self._alone.add(request_id)
            super().finish_requests(self.pairs[request_id].scaling.request_id, RequestStatus.FINISHED_ABORTED)

    def _look_at_admitted(self, output: SchedulerOutput) -> None:
        """Park requests whose scaling sequence was let in, and let go of pages held for what was not."""
        now = time.monotonic()
        admitted = [new.req_id for new in output.scheduled_new_reqs]
        for name in (*admitted, *output.scheduled_cached_reqs.resumed_req_ids):
            mixture = self.pairs.get(mixture_id(name))
            if mixture is None:
                continue
            if is_scaling(name) and not running(mixture) and running(mixture.scaling):
                if mixture.request_id not in self._parked:
                    self._parked[mixture.request_id] = mixture
                    if self.log_stats:
                        mixture.record_event(EngineCoreEventType.SCHEDULED, now)
            elif not is_scaling(name) and running(mixture):
                self._hits.release(mixture.request_id)
                if self._parked.pop(mixture.request_id, None) is not None:
                    self._mixing.add(mixture.request_id)
                    self._turns.unsettle()
                    self._seat_beside(mixture)
        self._hits.release_all_but(self._parked)

    def _seat_beside(self, mixture: MixtureRequest) -> None:
        """Move a request just admitted next to its scaling sequence: who came first keeps pages longest."""
        self.running.remove(mixture)
        self.running.insert(self.running.index(mixture.scaling) + 1, mixture)

    def _wake_parked(self) -> None:
        """Put requests whose first gates are there in front of all that wait; make room for those that found none."""
        for mixture in self._parked.values():
            ready = mixture.scaling.num_computed_tokens > self._hits.tokens(mixture.request_id)
            if ready and mixture not in self.kv_holding_waiting:
                self.kv_holding_waiting.add_request(mixture)
        for request_id in self._starved:
            while (starved := self._parked.get(request_id)) is not None and self._lacking_pages(starved) > 0:
                self._preempt_pair(self._youngest_running())  # itself at last, which takes it out of the parked

    def _youngest_running(self) -> Request:
        if self.policy == SchedulingPolicy.PRIORITY:
            return max(self.running, key=lambda request: (request.priority, request.arrival_time))
        return self.running[-1]

    def _lacking_pages(self, mixture: MixtureRequest) -> int:
        """Pages that a parked request needs beyond the free ones."""
        return self._hits.pages_of(mixture) - self._free_pages()

    def _free_pages(self) -> int:
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return free

    def _loras_in_use(self) -> set[int]:
        """Slots that may be needed at once: of the running, and of pairs half of which runs."""
        requests = [*self.running, *self._parked.values()]
        return {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}

    # Admission.

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not super()._handle_blocked_waiting_request(request):
            return False
        if not self.pairs or isinstance(request, MixtureRequest):
            return True
        owner = request.mixture if isinstance(request, ScalingRequest) else None
        if owner is not None:
            if owner.num_stale_output_tokens:
                return False  # preempted with a token on its way: start again once all are known
            if not super()._handle_blocked_waiting_request(owner):
                return False  # its grammar is being compiled
        lora = (owner or request).lora_request
        if lora is not None and lora.lora_int_id not in self._loras:
            if len(self._loras) >= self.lora_config.max_loras:
                return False
        if not self._has_room(request, owner):
            self.max_num_active_reqs = 0  # first come, first served: nobody behind it is let in
            return False
        if lora is not None:
            self._loras.add(lora.lora_int_id)
        return True

    def _has_room(self, request: Request, owner: MixtureRequest | None) -> bool:
        """Whether all of a request, or of a pair, fits beside what is promised to requests that will follow."""
        if owner is not None:
            self._hits.release(owner.request_id)
        rows = len(self.running) + len(self._hits) + (1 if owner is None else 2)
        free = self._free_pages() - self._hits.promised()
        if owner is not None:
            needed = self._hits.hold(owner)
        else:
            needed = self._hits.pages(request) if len(self._hits) else 0
        if rows <= self.max_num_running_reqs and needed <= free:
            return True
        if owner is not None:
            self._hits.release(owner.request_id)
            if not self.running and not len(self._hits):  # nothing will ever make room
                self.grammar_compile_error_reqs.add(owner.request_id)  # ends in error with this step's outputs
        return False

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        if isinstance(request, MixtureRequest):
            return *self._hits.of_mixture(request), 0, False
        if isinstance(request, ScalingRequest) and request.mixture is not None:
            return *self._hits.of_scaling(request.mixture), 0, False
        found: tuple[KVCacheBlocks, int, int, bool] = super()._get_local_prefix_cache_hit(request)
        return found

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        allowed = num_new_tokens
        if type(request) is Request:
            pass
        elif isinstance(request, MixtureRequest | SinglePassRequest):
            # Within schedule() the scaling sequence's count is still that of before the step.
            allowed = min(num_new_tokens, request.tokens_with_gates(num_computed_tokens))
        elif isinstance(request, ScalingRequest) and request.mixture is not None:
            # At most a step's tokens ahead: gates take memory until they are used.
            mixture = request.mixture
            done = mixture.num_computed_tokens if running(mixture) else self._hits.tokens(mixture.request_id)
            allowed = min(num_new_tokens, done + self.max_num_scheduled_tokens - num_computed_tokens)
        if allowed <= 0 or self._turns.waits(request):
            return 0
        return allowed  # vLLM's own keeps room for drafts of speculative decoding, which mixtures refuse

    @staticmethod
    def _holds_kv_blocks(request: Request) -> bool:
        return isinstance(request, MixtureRequest) or bool(Scheduler._holds_kv_blocks(request))

    # Preemption: gates are kept only until they are used, so a pair starts again together.

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        scaling = isinstance(request, ScalingRequest)
        super()._preempt_request(request, timestamp, drop_stale_output or scaling)
        if isinstance(request, MixtureRequest):
            self._mixing.discard(request.request_id)
            self._withdraw(request)
        if isinstance(request, MixtureRequest | ScalingRequest):
            self._half_preempted.add(mixture_id(request.request_id))

    def _preempt_pair(self, request: Request) -> None:
        """Preempt a running request between two steps, and the other half of its pair."""
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())
        self._finish_preemptions()

    def _finish_preemptions(self) -> None:
        """The other half of each pair that lost one half."""
        while self._half_preempted:
            request_id = self._half_preempted.pop()
            self._hits.release(request_id)
            mixture = self.pairs.get(request_id)
            if mixture is None:
                continue
            self.pair_preemptions += 1
            if self._parked.pop(request_id, None) is not None:
                self._withdraw(mixture)
                if not running(mixture):  # preempted before its own first step
                    if self.log_stats:
                        mixture.record_event(EngineCoreEventType.PREEMPTED, time.monotonic())
            for half in (mixture, mixture.scaling):
                if running(half):
                    self.running.remove(half)
                    self._preempt_request(half, time.monotonic())
                    self._half_preempted.discard(request_id)
                # It may be back in this very step, and the V1 runner must be told its tokens then.
                self.prev_step_scheduled_req_ids.discard(half.request_id)
            if request_id in self._alone:
                self._scale_again(mixture)

    def _scale_again(self, mixture: MixtureRequest) -> None:
        """A scaling sequence for a request that has lost its pages, in front of all that wait, as that one would be."""
        self._alone.discard(mixture.request_id)
        mixture.scaling = ScalingRequest(mixture, mixture.scaling.attempt + 1)
        super().add_request(mixture.scaling)
        self.waiting.remove_requests([mixture.scaling])
        self.waiting.prepend_request(mixture.scaling)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            for mixture in list(self._parked.values()):
                self._preempt_pair(mixture.scaling)
        done: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        self._finish_preemptions()
        return done

    # What leaves the scheduler.

    def _make_cached_request_data(
        self, running_reqs: list[Request], resumed_reqs: list[Request], num_scheduled_tokens: dict[str, int], *args: Any
    ) -> CachedRequestData:
        asynchronous = self.scheduler_config.async_scheduling
        # A pair's halves are away every other step, and of such requests vLLM sends all tokens: a cost that grows with
        # their length. Our runner needs the generated ones, and if it schedules synchronously has them.
        away: dict[str, list[int]] = {}
        if self.pairs and not self.use_v2_model_runner:
            for request in (*running_reqs, *resumed_reqs):
                half = isinstance(request, MixtureRequest | ScalingRequest)
                if half and request.request_id not in self.prev_step_scheduled_req_ids:
                    away[request.request_id] = list(request.output_token_ids) if asynchronous else []
            self.prev_step_scheduled_req_ids.update(away)  # vLLM replaces it right after this
        data: CachedRequestData = super()._make_cached_request_data(
            running_reqs, resumed_reqs, num_scheduled_tokens, *args
        )
        data.all_token_ids.update(away)
        if not self.pairs or not asynchronous:
            return data
        for place, name in enumerate(data.req_ids):
            if not is_scaling(name):
                continue
            # Asynchronously its last token may still be on its way: the runner takes it from the request's row of the
            # step before. Not counted by placeholders, which are 0 again if the request was preempted in this step.
            scaling = self.requests[name]
            missing = data.num_computed_tokens[place] + num_scheduled_tokens[name] - scaling.num_tokens
            if missing > 0:
                data.num_output_tokens[place] = scaling.num_output_tokens + missing
                if name in data.all_token_ids:
                    data.all_token_ids[name].extend([-1] * missing)
        return data

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        sampled = model_runner_output.sampled_token_ids
        if self.pairs and sampled:
            for name, row in model_runner_output.req_id_to_index.items():
                if is_scaling(name):
                    sampled[row] = []
        told = self._gates.take(getattr(model_runner_output, GATES, None))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._gates.attach(told, outputs)
        return outputs

    def get_request_counts(self) -> tuple[int, int]:
        if not self.pairs:
            counts: tuple[int, int] = super().get_request_counts()
            return counts
        begun = len(self.running) - len(self._mixing)  # two rows each; of the parked one runs
        return begun, len(self.requests) - len(self.pairs) + len(self._alone) - begun

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.pairs:
            begun, waiting = self.get_request_counts()
            skipped = {mixture_id(request.request_id) for request in self.deferred_waiting}
            deferred = sum(not running(self.requests[each]) and each not in self._parked for each in skipped)
            stats.num_running_reqs = begun
            stats.num_waiting_reqs, stats.num_skipped_waiting_reqs = waiting - deferred, deferred
        return stats


class MixtureScheduler(PairScheduling):
    """For `SchedulerConfig.scheduler_cls`, when vLLM schedules synchronously."""


class AsyncMixtureScheduler(PairScheduling, AsyncScheduler):
    """For `SchedulerConfig.scheduler_cls`, when vLLM schedules asynchronously."""
