"""A mixture's request and its scaling sequence: two requests of vLLM's scheduler over the same tokens.

The scaling sequence computes each token as a row of the base model; its hidden state gives the gates with which the
mixture's request computes that token in a later step. While decoding the two take turns. With routing in one pass
(`xloom.mixtures.single_pass`) the scaling sequence ends with the prompt, or there is none.

Relies on vLLM 0.32: `vllm.v1.request.Request` (the attributes set here), and on `LoRARequest.lora_path` being the
prepared folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from xloom.mixtures.routing.base import Source
from xloom.mixtures.routing.registry import read_description
from xloom.mixtures.single_pass import segment_end

SCALING_MARK = "~scaling"  # in a scaling sequence's id; what precedes it is the mixture's request
# In SamplingParams.extra_args:
BUNDLE_ARG = "xloom_bundle"  # of a scaling sequence: the LoRARequest whose router reads the hidden states
PROMPT_ARG = "xloom_prompt_tokens"  # of a request that goes on elsewhere: the tokens of its prompt that a client sent
WEIGHTS_ARG = "xloom_weights"  # of a mixture of constants: the request's own, one for each adapter, in their order
LAYERS_ARG = "xloom_layers"  # of a request that asks for the gates of each layer


def scaling_id(request_id: str) -> str:
    """The id of a request's scaling sequence."""
    return request_id + SCALING_MARK


def is_scaling(request_id: str) -> bool:
    """Whether an id is a scaling sequence's."""
    return SCALING_MARK in request_id


def mixture_id(request_id: str) -> str:
    """The id of the mixture's request that a request belongs to; its own when it is no scaling sequence."""
    return request_id.partition(SCALING_MARK)[0]


class GateSource(NamedTuple):
    """Which hidden states the gates of a prepared bundle's tokens come from."""

    scaling_pass_value: float
    routing_passes: int
    prefill: str


@lru_cache(maxsize=4096)
def gate_source(path: str) -> GateSource | None:
    """A prepared bundle's; None for a plain adapter, and for a mixture whose gates come from no hidden states."""
    found = read_description(Path(path))
    if found is None or found[0].source is not Source.HIDDEN:
        return None
    return GateSource(*(found[1]["routing"][field] for field in GateSource._fields))


@lru_cache(maxsize=4096)
def adapters_of(path: str) -> tuple[str, ...]:
    """The names of a prepared mixture's adapters; none for a plain adapter."""
    found = read_description(Path(path))
    return () if found is None else tuple(found[1]["adapter_names"])


class Constants(NamedTuple):
    """A prepared mixture whose gates are constants."""

    names: tuple[str, ...]  # of its adapters
    weights: tuple[float, ...]  # its own


@lru_cache(maxsize=4096)
def constants_of(path: str) -> Constants | None:
    """A prepared folder's; None where gates are no constants."""
    found = read_description(Path(path))
    if found is None or found[0].source is not Source.CONSTANT:
        return None
    return Constants(tuple(found[1]["adapter_names"]), tuple(map(float, found[1]["routing"]["weights"])))


def with_weights(sampling: SamplingParams, salt: str | None, weights: Sequence[float]) -> str:
    """Give a mixture's request its weights. The salt it needs then: no other weights read its pages, nor it theirs.

    vLLM tells cache blocks apart by `Request.cache_salt` in the first of them, and each by the one before it
    (vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys, 0.32). Requests with the mixture's own weights have
    such a salt, too: it is a digest with what the client sent in it, so that nobody can ask for another's.
    """
    sampling.extra_args = (sampling.extra_args or {}) | {WEIGHTS_ARG: list(weights)}
    identity = json.dumps([salt, *(float(weight).hex() for weight in weights)])
    return hashlib.sha256(b"xloom weights" + identity.encode()).hexdigest()


def source_of(lora: LoRARequest | None) -> GateSource | None:
    """Which hidden states the gates of a request come from; None if none do."""
    return None if lora is None else gate_source(lora.lora_path)


def client_tokens(num_prompt_tokens: int, sampling: SamplingParams | None) -> int:
    """How many tokens of a prompt a client sent: those after them were generated, on a replica that is lost."""
    given = (sampling.extra_args or {}).get(PROMPT_ARG) if sampling is not None else None
    return num_prompt_tokens if given is None else min(int(given), num_prompt_tokens)


class SinglePassRequest(Request):
    """A mixture's request whose gates come from itself: the scheduler never computes past those that are known."""

    num_client_tokens: int
    prefill: str

    def tokens_with_gates(self, num_computed_tokens: int) -> int:
        """The tokens from `num_computed_tokens` on whose gates are known."""
        return segment_end(num_computed_tokens, self.num_client_tokens, self.prefill) - num_computed_tokens


class MixtureRequest(Request):
    """A request that computes only tokens whose gates are known. Made of vLLM's own by `mixture_request`."""

    scaling: ScalingRequest
    # Routing in one pass: the tokens whose gates the scaling sequence makes. None: all of them.
    num_client_tokens: int | None = None

    @property
    def prompt_is_scaled(self) -> bool:
        """Whether the scaling sequence has made all gates it will."""
        done: int = self.scaling.num_computed_tokens
        return self.num_client_tokens is not None and done >= self.num_client_tokens

    def tokens_with_gates(self, num_computed_tokens: int) -> int:
        """The tokens from `num_computed_tokens` on whose gates are known."""
        if self.num_client_tokens is not None and num_computed_tokens >= self.num_client_tokens:
            return 1  # its gates are made of the token before
        return int(self.scaling.num_computed_tokens - num_computed_tokens)

    def append_output_token_ids(self, token_ids: int | list[int]) -> None:
        super().append_output_token_ids(token_ids)
        self.scaling.update_block_hashes()


class ScalingRequest(Request):
    """The scaling sequence of a mixture's request: it has that one's tokens, and what it samples is dropped."""

    mixture: MixtureRequest | None = None

    def __init__(self, mixture: MixtureRequest, attempt: int = 0) -> None:
        lora, end = mixture.lora_request, mixture.num_client_tokens
        super().__init__(
            # An id of its own each time: asynchronously the last step of the one before may still be under way.
            request_id=scaling_id(mixture.request_id) + (str(attempt) if attempt else ""),
            prompt_token_ids=mixture.prompt_token_ids if end is None else mixture.prompt_token_ids[:end],
            sampling_params=SamplingParams(
                temperature=0.0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                skip_reading_prefix_cache=mixture.skip_reading_prefix_cache,
                extra_args={BUNDLE_ARG: lora},
            ),
            pooling_params=None,
            client_index=mixture.client_index,
            arrival_time=mixture.arrival_time,
            lora_request=_constant_gates(lora),
            cache_salt=mixture.cache_salt,
            priority=mixture.priority,
            block_hasher=mixture._block_hasher,
        )
        if end is None:
            self._all_token_ids, self._output_token_ids = mixture._all_token_ids, mixture._output_token_ids
            self.all_token_ids, self.output_token_ids = mixture.all_token_ids, mixture.output_token_ids
            self.max_tokens = mixture.max_tokens  # asynchronously: no step for the token after the last
        self.attempt, self.mixture = attempt, mixture

    # What the mixture's request has sampled and the scheduler not yet seen is this one's next token, too.
    @property
    def num_output_placeholders(self) -> int:
        mixture = self.mixture
        return 0 if mixture is None or mixture.num_client_tokens is not None else mixture.num_output_placeholders

    @num_output_placeholders.setter
    def num_output_placeholders(self, value: int) -> None:
        """The mixture's request counts them."""


def _constant_gates(lora: LoRARequest) -> LoRARequest | None:
    """None for a row of the base model. With `scaling_pass_value` it is the bundle's, with cache blocks of its own.

    vLLM tells cache blocks apart by `lora_name`, slots by `lora_int_id` (vllm.v1.core.kv_cache_utils, 0.32).
    """
    source = gate_source(lora.lora_path)
    if source is None or not source.scaling_pass_value:
        return None
    return LoRARequest(lora_name=lora.lora_name + SCALING_MARK, lora_int_id=lora.lora_int_id, lora_path=lora.lora_path)


def mixture_request(request: Request, source: GateSource, hash_block_size: int) -> MixtureRequest | SinglePassRequest:
    """Make a mixture's request of vLLM's, with its scaling sequence if it has one."""
    kind = SinglePassRequest if source.routing_passes == 1 and source.prefill == "lagged" else MixtureRequest
    request.__class__ = kind
    if source.routing_passes == 1:
        request.num_client_tokens = client_tokens(request.num_prompt_tokens, request.sampling_params)
        _set_apart(request, hash_block_size)
    if isinstance(request, SinglePassRequest):
        request.prefill = source.prefill
        # The hidden state that gives the next gates is in no page.
        request.skip_reading_prefix_cache = True
        return request
    assert isinstance(request, MixtureRequest)
    request.scaling = ScalingRequest(request)
    return request


def _set_apart(request: Any, hash_block_size: int) -> None:
    """No other request reads pages past the prompt: there the same tokens may be somebody's prompt, with other gates.

    vLLM finds pages by `Request.block_hashes`, made by `_block_hasher` of the tokens after those hashed; vLLM 0.32.
    """
    shared, original = request.num_client_tokens // hash_block_size, request._block_hasher
    if original is None:
        return

    def marked(request: Any) -> list[Any]:
        first = len(request.block_hashes)
        return [
            each if number < shared else hashlib.sha256(b"single pass" + each).digest()
            for number, each in enumerate(original(request), start=first)
        ]

    request._block_hasher = marked
    del request.block_hashes[shared:]
    request.update_block_hashes()


def running(request: Request) -> bool:
    """Whether the scheduler counts it as running."""
    return request.status is RequestStatus.RUNNING
