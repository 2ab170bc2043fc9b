"""The official client against a served tiny model: every kind of model streams, and equals PEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..served import TOKENS, Served
from ..weights import MAX_LENGTH, Oracle, Weights

NAMES = ["base", "alpha", "beta", "blend"]
PROMPT = tuple(range(40, 85))  # more than a KV page
MESSAGES: Any = [{"role": "user", "content": "What is woven?"}]


def test_models_lists_every_name_with_its_kind(server: Served) -> None:
    models = {model.id: model.model_extra or {} for model in server.openai.models.list()}
    kinds = {name: extra["kind"] for name, extra in models.items()}
    mixtures = {"blend": "xlora", "arrow": "arrow", "weighted": "fixed"}
    assert kinds == {"base": "base", "alpha": "lora", "beta": "lora"} | mixtures
    assert models["blend"]["parent"] == "base"
    assert models["base"]["max_model_len"] == MAX_LENGTH


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_chat_gives_pefts_tokens(server: Served, oracle: Oracle, name: str) -> None:
    tokens: list[int] = []
    prompt: tuple[int, ...] = ()
    text = ""
    finish = None
    chunks = 0
    with server.openai.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=24, temperature=0, stream=True, extra_body=TOKENS
    ) as stream:
        for chunk in stream:
            assert chunk.model == name
            extra = chunk.model_extra or {}
            prompt = prompt or tuple(extra.get("prompt_token_ids") or ())
            if chunk.choices:
                choice = chunk.choices[0]
                tokens += (choice.model_extra or {}).get("token_ids") or []
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
                chunks += 1

    assert tokens == oracle(name, prompt, 24)
    assert finish == "length"
    assert chunks > 4  # as they came, not all at the end
    whole = server.openai.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=24, temperature=0, extra_body=TOKENS
    )
    assert whole.choices[0].message.content == text != ""


def test_each_name_answers_in_its_own_way(server: Served) -> None:
    answers = {name: tuple(server.greedy(name, list(PROMPT))) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_completions_return_token_ids_equal_to_pefts(server: Served, oracle: Oracle, name: str) -> None:
    answer = server.openai.completions.create(
        model=name, prompt=list(PROMPT), max_tokens=16, temperature=0, extra_body=TOKENS
    )
    extra = answer.choices[0].model_extra or {}
    assert extra["prompt_token_ids"] == list(PROMPT)
    assert extra["token_ids"] == oracle(name, PROMPT, 16)
    assert answer.model == name
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 16)


def test_completions_leave_token_ids_out_unless_asked(server: Served) -> None:
    answer = server.openai.completions.create(model="base", prompt=list(PROMPT), max_tokens=2)
    assert not (answer.choices[0].model_extra or {}).get("token_ids")


# What vLLM's front end makes of tokens, over our client.


def test_two_samples_of_one_prompt(server: Served) -> None:
    answer = server.openai.completions.create(
        model="blend", prompt=list(PROMPT), n=2, max_tokens=12, temperature=1.0, seed=5, extra_body=TOKENS
    )
    samples = [(choice.model_extra or {})["token_ids"] for choice in answer.choices]
    assert [len(sample) for sample in samples] == [12, 12]
    assert samples[0] != samples[1]
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_a_seed_repeats_a_sample(server: Served) -> None:
    def sample(seed: int) -> Any:
        answer = server.openai.completions.create(
            model="alpha", prompt=list(PROMPT), max_tokens=16, temperature=1.0, seed=seed, extra_body=TOKENS
        )
        return (answer.choices[0].model_extra or {})["token_ids"]

    assert sample(1) == sample(1) != sample(2)


def test_a_stop_string_ends_the_text_and_frees_the_pages(server: Served) -> None:
    def complete(**options: Any) -> Any:
        return server.openai.completions.create(
            model="base", prompt=list(PROMPT), temperature=0, extra_body={"ignore_eos": True}, **options
        ).choices[0]

    text = complete(max_tokens=40).text
    stop = text[12:14]
    stopped = complete(max_tokens=1500, stop=[stop])  # the engine itself would go on far beyond
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    server.wait_idle()


def test_logprobs_name_the_chosen_token_first(server: Served) -> None:
    answer = server.openai.chat.completions.create(
        model="blend", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for position in logprobs.content:
        values = [candidate.logprob for candidate in position.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert position.logprob == values[0] <= 0  # greedy: the likeliest
        assert position.token == position.top_logprobs[0].token


def test_usage_comes_at_the_end_of_a_stream(server: Served) -> None:
    with server.openai.chat.completions.create(
        model="beta",
        messages=MESSAGES,
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ) as stream:
        usages = [chunk.usage for chunk in stream]
    assert [usage for usage in usages[:-1] if usage is not None] == []
    assert usages[-1] is not None
    assert usages[-1].completion_tokens == 7


def test_a_choice_is_kept_to(server: Served) -> None:
    answer = server.openai.completions.create(
        model="blend",
        prompt=list(PROMPT),
        max_tokens=20,
        temperature=1.0,
        extra_body={"structured_outputs": {"choice": ["warp", "weft"]}},
    )
    assert answer.choices[0].text in ("warp", "weft")


def test_a_json_schema_is_kept_to(server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"thread": {"enum": ["warp", "weft"]}, "count": {"enum": [1, 2]}},
        "required": ["thread", "count"],
        "additionalProperties": False,
    }
    answer = server.openai.chat.completions.create(
        model="blend",
        messages=MESSAGES,
        max_tokens=400,
        temperature=1.0,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "cloth", "schema": schema, "strict": True}},
    )
    made = json.loads(answer.choices[0].message.content or "")
    assert made["thread"] in ("warp", "weft")
    assert made["count"] in (1, 2)


def test_served_names_are_those_of_the_settings(server: Served, weights: Weights) -> None:
    status = server.status()
    assert status["model"] == "base"
    sources = {adapter["name"]: adapter["source"] for adapter in status["adapters"]}
    assert sources == {name: str(path) for name, path in weights.adapters.items()} | {
        "blend": str(weights.bundle),
        "arrow": "arrow: alpha, beta",
        "weighted": "fixed: alpha, beta",
    }
    assert [replica["state"] for replica in status["replicas"]] == ["ready"]
    assert all(adapter["replicas"] == 1 for adapter in status["adapters"])
