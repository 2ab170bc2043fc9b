"""What would end the engine in its worker is refused when it comes; what a worker takes is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams, envs
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample import logit_bias
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.states import RequestState

from xloom.protocol import XloomError
from xloom.vllm.engine.request_limits import RequestLimits, cap_lengths

VOCABULARY, CONTEXT = 4096, 512
V2 = RequestLimits(
    logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS,
    logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS,
    logit_bias.MAX_NUM_STOP_TOKEN_IDS,
    envs.VLLM_MAX_NUM_BAD_WORDS,
    envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS,
)


def params(bad_words: list[list[int]] | None = None, **fields: Any) -> SamplingParams:
    made = SamplingParams(**fields)
    made._bad_words_token_ids = bad_words
    return made


def check(limits: RequestLimits, sampling: SamplingParams) -> None:
    """As the backend does."""
    limits.check(sampling, VOCABULARY)
    cap_lengths(sampling, CONTEXT)


class V2Worker:
    """The parts of vLLM's V2 worker that take a request, on CPU."""

    def __init__(self) -> None:
        device = torch.device("cpu")
        self._requests = RequestState(1, CONTEXT, CONTEXT, 0, VOCABULARY, device)
        self._sampling = SamplingStates(1, VOCABULARY)
        state = LogitsProcRequestState.from_request_state(self._requests)
        self._processors = [kind(None, state) for kind in (LogitBiasState, PenaltiesState, BadWordsState)]

    def take(self, sampling: SamplingParams) -> None:
        """As `GPUModelRunner.add_requests` and `Sampler.add_request`, up to the kernels."""
        prompt = [1, 2, 3]
        try:
            self._requests.add_request("r", len(prompt), prompt, 0, sampling.max_tokens)
            for part in (self._sampling, *self._processors):
                part.add_request(0, sampling)
            for staged in (self._processors[0], self._processors[2]):
                for each in vars(staged).values():
                    if hasattr(each, "_staged_write_contents"):
                        torch.tensor(each._staged_write_contents, dtype=each.dtype)
        finally:
            for staged in (self._processors[0], self._processors[2]):
                for each in vars(staged).values():
                    if hasattr(each, "_staged_write_contents"):
                        each.clear_staged_writes()
            self._requests.remove_request("r")


@pytest.fixture(scope="module")
def worker() -> V2Worker:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer_utils, "is_uva_available", lambda: False)  # no GPU: no memory that it could see
        return V2Worker()


TOO_MANY: list[dict[str, Any]] = [
    {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    {"allowed_token_ids": list(range(1025))},
    {"min_tokens": 1, "stop_token_ids": list(range(129))},
    {"bad_words": [[1]] * 129},
    {"bad_words": [[1] * 1000, [2] * 25]},
]
OUT_OF_RANGE: list[dict[str, Any]] = [
    {"seed": 2**63},
    {"stop_token_ids": [2**40], "min_tokens": 1},
    {"logit_bias": {2**40: 1.0}},
    {"allowed_token_ids": [2**31]},
    {"bad_words": [[2**33]]},
]
INDEXES_LOGITS: list[dict[str, Any]] = [  # a kernel would write beyond its row of them
    {"stop_token_ids": [VOCABULARY], "min_tokens": 1},
    {"logit_bias": {VOCABULARY: 1.0}},
    {"allowed_token_ids": [-1]},
    {"bad_words": [[VOCABULARY]]},
]
FITS: list[dict[str, Any]] = [
    {},
    {"logit_bias": dict.fromkeys(range(1024), 1.0), "seed": 2**63 - 1, "stop_token_ids": list(range(300))},
    {"allowed_token_ids": list(range(1024))},
    {"bad_words": [[1]] * 128},
    {"bad_words": [[1] * 1000, [2] * 24]},
    {"min_tokens": 1, "stop_token_ids": list(range(128)), "seed": -(2**63)},
    {"max_tokens": 2**62, "min_tokens": 2**61},
    {"max_tokens": None, "min_tokens": 2**40},
    {"top_k": 2**62, "temperature": 2.0, "repetition_penalty": 1e300, "frequency_penalty": -2.0},
]


@pytest.mark.parametrize("fields", TOO_MANY)
def test_more_than_the_workers_arrays_hold_is_refused_where_they_are(worker: V2Worker, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Too many"):
        worker.take(params(**fields))
    with pytest.raises(XloomError) as caught:
        check(V2, params(**fields))
    assert caught.value.code == "invalid_sampling"
    check(RequestLimits(), params(**fields))  # the V1 runner takes it


@pytest.mark.parametrize("fields", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_everywhere(worker: V2Worker, fields: dict[str, Any]) -> None:
    with pytest.raises((OverflowError, RuntimeError)):
        worker.take(params(**fields))
    for limits in (V2, RequestLimits()):
        with pytest.raises(XloomError) as caught:
            check(limits, params(**fields))
        assert caught.value.code == "invalid_sampling"


@pytest.mark.parametrize("fields", INDEXES_LOGITS)
def test_tokens_outside_the_vocabulary_are_refused_everywhere(fields: dict[str, Any]) -> None:
    for limits in (V2, RequestLimits()):
        with pytest.raises(XloomError) as caught:
            check(limits, params(**fields))
        assert caught.value.code == "invalid_sampling"


@pytest.mark.parametrize("fields", FITS)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_what_fits_is_taken(worker: V2Worker, fields: dict[str, Any]) -> None:
    for limits in (V2, RequestLimits()):
        sampling = params(**fields)
        check(limits, sampling)
        worker.take(sampling)


def test_an_answer_longer_than_the_context_is_one_up_to_it(worker: V2Worker) -> None:
    with pytest.raises(OverflowError):
        worker.take(params(max_tokens=2**40))
    sampling = params(max_tokens=2**40, min_tokens=2**39)
    cap_lengths(sampling, CONTEXT)
    assert (sampling.max_tokens, sampling.min_tokens) == (CONTEXT, CONTEXT)
    cap_lengths(short := params(max_tokens=7, min_tokens=3), CONTEXT)
    assert (short.max_tokens, short.min_tokens) == (7, 3)
