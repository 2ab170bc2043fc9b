"""What vLLM says of its command line is said of the settings."""

from __future__ import annotations

import inspect
import re

import pytest
from vllm import sampling_params
from vllm.renderers import online_renderer
from vllm.v1.engine import input_processor

from xloom.vllm.front_end.wording import in_settings


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            '"auto" tool choice requires router.front_end_args.enable_auto_tool_choice and '
            "router.front_end_args.tool_call_parser to be set",
        ),
        ("Set max_logprobs (--max-logprobs) to 5.", "Set max_logprobs (engine.extra_args.max_logprobs) to 5."),
        ("Raise --max-model-len.", "Raise engine.max_model_len."),
        ("a--b, -- and --no-such-flag", "a--b, -- and --no-such-flag"),
        ("The prompt is too long.", "The prompt is too long."),
    ],
)
def test_a_flag_becomes_the_key_that_sets_it(said: str, told: str) -> None:
    assert in_settings(said) == told


@pytest.mark.parametrize("module", [online_renderer, input_processor, sampling_params])
def test_every_flag_in_what_clients_are_told_has_its_key(module: object) -> None:
    texts = re.findall(r'"[^"\n]*--[a-z][^"\n]*"', inspect.getsource(module))
    assert texts
    for text in texts:
        assert not re.search(r"(?<![\w-])--[a-z]", in_settings(text)), text
