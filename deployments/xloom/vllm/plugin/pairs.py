"""A mixture's request and its scaling sequence: two requests of vLLM's scheduler over the same tokens.

The scaling sequence computes each token as a row of the base model; its hidden state gives the gates with which the
mixture's request computes that token in a later step. While decoding the two take turns.

Relies on vLLM 0.32: `vllm.v1.request.Request` (the attributes set here), and on `LoRARequest.lora_path` being the
prepared folder.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from xloom.mixtures.prepare import XLORA_FILE

SCALING_MARK = "~scaling"  # ends a scaling sequence's id; what precedes it is the mixture's request
BUNDLE_ARG = "xloom_bundle"  # in SamplingParams.extra_args: the LoRARequest whose router reads the hidden states


def scaling_id(request_id: str) -> str:
    """The id of a request's scaling sequence."""
    return request_id + SCALING_MARK


def is_scaling(request_id: str) -> bool:
    """Whether an id is a scaling sequence's."""
    return request_id.endswith(SCALING_MARK)


def mixture_id(request_id: str) -> str:
    """The id of the mixture's request that a request belongs to; its own when it is no scaling sequence."""
    return request_id.removesuffix(SCALING_MARK)


@lru_cache(maxsize=4096)
def scaling_pass_value(path: str) -> float | None:
    """A prepared bundle's `scaling_pass_value`; None for a plain adapter."""
    file = Path(path) / XLORA_FILE
    if not file.is_file():
        return None
    return float(json.loads(file.read_text(encoding="utf-8"))["routing"]["scaling_pass_value"])


def is_bundle(lora: LoRARequest | None) -> bool:
    """Whether a request is for a mixture."""
    return lora is not None and scaling_pass_value(lora.lora_path) is not None


class MixtureRequest(Request):
    """A request that computes only tokens whose gates are known. Made of vLLM's own by `pair`."""

    scaling: ScalingRequest

    def append_output_token_ids(self, token_ids: int | list[int]) -> None:
        super().append_output_token_ids(token_ids)
        self.scaling.update_block_hashes()


class ScalingRequest(Request):
    """The scaling sequence of a mixture's request: it shares that one's token lists, and what it samples is dropped."""

    mixture: MixtureRequest | None = None

    def __init__(self, mixture: MixtureRequest) -> None:
        lora = mixture.lora_request
        super().__init__(
            request_id=scaling_id(mixture.request_id),
            prompt_token_ids=mixture.prompt_token_ids,
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
        self._all_token_ids, self._output_token_ids = mixture._all_token_ids, mixture._output_token_ids
        self.all_token_ids, self.output_token_ids = mixture.all_token_ids, mixture.output_token_ids
        self.max_tokens = mixture.max_tokens  # asynchronously: no step for the token after the last
        self.mixture = mixture

    # What the mixture's request has sampled and the scheduler not yet seen is this one's next token, too.
    @property
    def num_output_placeholders(self) -> int:
        return 0 if self.mixture is None else self.mixture.num_output_placeholders

    @num_output_placeholders.setter
    def num_output_placeholders(self, value: int) -> None:
        """The mixture's request counts them."""


def _constant_gates(lora: LoRARequest) -> LoRARequest | None:
    """None for a row of the base model. With `scaling_pass_value` it is the bundle's, with cache blocks of its own.

    vLLM tells cache blocks apart by `lora_name`, slots by `lora_int_id` (vllm.v1.core.kv_cache_utils, 0.32).
    """
    if not scaling_pass_value(lora.lora_path):
        return None
    return LoRARequest(lora_name=lora.lora_name + SCALING_MARK, lora_int_id=lora.lora_int_id, lora_path=lora.lora_path)


def pair(request: Request) -> MixtureRequest:
    """Make a mixture's request of vLLM's, and its scaling sequence."""
    request.__class__ = MixtureRequest
    assert isinstance(request, MixtureRequest)
    request.scaling = ScalingRequest(request)
    return request


def running(request: Request) -> bool:
    """Whether the scheduler counts it as running."""
    return request.status is RequestStatus.RUNNING
