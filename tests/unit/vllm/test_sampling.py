"""Sampling parameters survive the way to a replica."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

from xloom.vllm.sampling import sampling_from_dict, sampling_to_dict

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "max_tokens": 7},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 2**63 + 5},
    {"stop_token_ids": [5, 3, 5], "min_tokens": 3, "ignore_eos": True},
    {"logit_bias": {5: -100.0, 77: 1.5}, "allowed_token_ids": [5, 77]},
    {"bad_words": ["no", "never"]},
    {"logprobs": -1, "prompt_logprobs": 3, "flat_logprobs": True},
    {"logprob_token_ids": [1, 2, 3], "logprobs": 3},
    {"prompt_logprob_token_ids": np.array([[1, 2], [3, -1]]), "prompt_logprob_start": 1},
    {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
    {"stop": ["END", "\n\n"], "include_stop_str_in_output": True, "output_kind": RequestOutputKind.DELTA},
    {"output_kind": RequestOutputKind.FINAL_ONLY, "n": 3, "stream_interval": 4},
    {"repetition_detection": RepetitionDetectionParams(4, 1, 3), "thinking_token_budget": 9},
    {"extra_args": {"a": [1, {"b": None}]}, "skip_special_tokens": False, "max_tokens": None},
    *(
        {"structured_outputs": StructuredOutputsParams(**{kind: value})}
        for kind, value in {
            "json": {"type": "object", "properties": {"a": {"type": "integer"}}},
            "regex": "a+",
            "choice": ["yes", "no"],
            "grammar": 'root ::= "x"',
            "json_object": True,
        }.items()
    ),
]


@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "+".join(fields) or "defaults")
def test_parameters_are_the_same_after_the_wire(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    params.update_from_generation_config({"eos_token_id": [257, 300]}, eos_token_id=257)
    if params.bad_words:
        params._bad_words_token_ids = [[1, 2], [3]]
    if params.structured_outputs:
        params.structured_outputs._backend = "xgrammar"
        params.structured_outputs._backend_was_auto = True
    wire = msgspec.msgpack.encode(sampling_to_dict(params))
    returned = sampling_from_dict(msgspec.msgpack.decode(wire))
    for field in SamplingParams.__struct_fields__:
        np.testing.assert_equal(getattr(returned, field), getattr(params, field), err_msg=field)


def test_defaults_are_left_out_of_the_message() -> None:
    plain = sampling_to_dict(SamplingParams(temperature=0.5, max_tokens=9))
    assert "top_p" not in plain
    assert plain["temperature"] == 0.5
    assert plain["max_tokens"] == 9


def test_a_field_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        sampling_from_dict({"temperature": "hot"})
