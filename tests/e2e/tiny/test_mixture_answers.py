"""What answers say of their mixtures, on every route, through OpenAI's own client where it has the route."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.models import load_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.reference import OnePassReference
from xloom.protocol import Blend

from ..served import TOKENS, Served, wait_until
from ..weights import Weights

PROMPT = list(range(60, 101))  # more than a KV page
MESSAGES: Any = [{"role": "user", "content": "Who weaves?"}]
NAMES = ["alpha", "beta"]
GREEDY: dict[str, Any] = {"temperature": 0}


def mixture_of(answer: Any) -> dict[str, Any]:
    """Of a choice, a response or a message."""
    told = (answer.model_extra or {})["mixture"]
    assert isinstance(told, dict)
    return told


def assert_shape(told: dict[str, Any], name: str, routing: str, tokens: int) -> None:
    assert (told["name"], told["routing"], told["tokens"]) == (name, routing, tokens)
    assert list(told["gates"]) == told["adapters"]
    assert told["cached_prompt_tokens"] >= 0
    assert (told["prompt_gates"] is None) == (told["prompt_tokens"] == 0)


def test_a_completion_tells_the_references_gates(server: Served, weights: Weights, tmp_path: Path) -> None:
    answer = server.openai.completions.create(
        model="arrow", prompt=PROMPT, max_tokens=12, **GREEDY,
        extra_body=TOKENS | {"return_mixture": "layers", "ignore_eos": True},
    )  # fmt: skip
    (choice,) = answer.choices
    told, tokens = mixture_of(choice), (choice.model_extra or {})["token_ids"]
    assert_shape(told, "arrow", "arrow", 12)
    assert told["adapters"] == NAMES
    assert told["prompt_tokens"] + told["cached_prompt_tokens"] == len(PROMPT) - 1

    blend = Blend("arrow", {}, top_k=1)
    prepare_mixture(blend, weights.adapters, linear_modules(str(weights.base)), tmp_path / "prepared", max_rank=64)
    reference = OnePassReference.load(load_model(weights.base), tmp_path / "prepared")
    gates = reference.gates_of(PROMPT + tokens[:-1])
    own = gates[len(PROMPT) - 1 :]
    assert np.array(told["token_gates"]) == pytest.approx(own.mean(1).numpy(), abs=1e-3)
    assert list(told["gates"].values()) == pytest.approx(own.mean((0, 1)).tolist(), abs=1e-3)
    layers = np.array(told["layer_gates"])
    assert layers.shape == (12, 2, 2)
    assert layers.mean(1) == pytest.approx(np.array(told["token_gates"]), abs=1e-3)
    computed = gates[told["cached_prompt_tokens"] : len(PROMPT) - 1]
    assert list(told["prompt_gates"].values()) == pytest.approx(computed.mean((0, 1)).tolist(), abs=1e-3)

    again = server.openai.completions.create(
        model="arrow", prompt=PROMPT, max_tokens=12, extra_body={"ignore_eos": True}, **GREEDY
    )
    shorter = mixture_of(again.choices[0])
    assert shorter["cached_prompt_tokens"] >= 32  # a page
    assert shorter["gates"] == told["gates"]
    assert "token_gates" not in shorter
    assert "layer_gates" not in shorter


def test_each_choice_has_its_own(server: Served) -> None:
    asked: dict[str, Any] = {"model": "weighted", "prompt": ["one", "two"], "n": 2, "max_tokens": 5, "seed": 3}
    extra = {"ignore_eos": True, "mixture": {"beta": 0.5}, "return_mixture": "tokens"}
    whole = server.openai.completions.create(**asked, extra_body=extra)
    assert len(whole.choices) == 4
    for choice in whole.choices:
        told = mixture_of(choice)
        assert_shape(told, "weighted", "fixed", 5)
        assert told["gates"] == {"alpha": 0, "beta": 0.5}
        assert told["token_gates"] == [[0, 0.5]] * 5
    streamed: dict[int, list[dict[str, Any]]] = {}
    with server.openai.completions.create(**asked, extra_body=extra, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                if "mixture" in (choice.model_extra or {}):
                    assert choice.finish_reason is not None
                    streamed.setdefault(choice.index, []).append(mixture_of(choice))
    assert sorted(streamed) == [0, 1, 2, 3]
    for (told,) in streamed.values():
        assert_shape(told, "weighted", "fixed", 5)


@pytest.mark.parametrize("name", ["blend", "arrow"])
def test_chat_whole_and_streamed_say_the_same(server: Served, name: str) -> None:
    extra = {"ignore_eos": True, "return_mixture": "tokens"}
    chat = server.openai.chat.completions
    whole = chat.create(model=name, messages=MESSAGES, max_tokens=10, extra_body=extra, **GREEDY)
    told = mixture_of(whole.choices[0])
    assert_shape(told, name, "xlora" if name == "blend" else "arrow", 10)
    assert len(told["token_gates"]) == 10
    assert np.mean(told["token_gates"], 0) == pytest.approx(list(told["gates"].values()), abs=1e-4)
    ends = []
    with chat.create(
        model=name, messages=MESSAGES, max_tokens=10, extra_body=extra, stream=True,
        stream_options={"include_usage": True}, **GREEDY,
    ) as stream:  # fmt: skip
        for chunk in stream:
            ends += [choice for choice in chunk.choices if "mixture" in (choice.model_extra or {})]
    (end,) = ends
    assert end.finish_reason == "length"
    assert mixture_of(end)["token_gates"] == told["token_gates"]


def test_an_answer_that_a_stop_string_ends_has_the_gates_up_to_there(server: Served) -> None:
    asked: dict[str, Any] = {"model": "blend", "prompt": PROMPT, "max_tokens": 24} | GREEDY
    free = server.openai.completions.create(**asked, extra_body=TOKENS | {"return_mixture": "tokens"})
    text = free.choices[0].text
    stop = text[len(text) // 2 :][:2]
    stopped = server.openai.completions.create(**asked, stop=stop, extra_body=TOKENS | {"return_mixture": "tokens"})
    (choice,) = stopped.choices
    tokens, told = (choice.model_extra or {})["token_ids"], mixture_of(choice)
    assert choice.finish_reason == "stop"
    assert told["tokens"] == len(tokens) == len(told["token_gates"]) < 24
    assert told["token_gates"] == mixture_of(free.choices[0])["token_gates"][: len(tokens)]


def test_logprobs_and_gates_in_one_answer(server: Served) -> None:
    chat = server.openai.chat.completions.create(
        model="arrow", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}
    )
    assert_shape(mixture_of(chat.choices[0]), "arrow", "arrow", 4)
    assert chat.choices[0].logprobs is not None
    text = server.openai.completions.create(
        model="arrow", prompt=PROMPT, max_tokens=4, logprobs=2, extra_body={"ignore_eos": True}
    )
    assert_shape(mixture_of(text.choices[0]), "arrow", "arrow", 4)


def test_responses(server: Served) -> None:
    extra = {"ignore_eos": True, "return_mixture": "tokens"}
    asked: dict[str, Any] = {"model": "blend", "input": "Who weaves?", "max_output_tokens": 8, "temperature": 0}
    told = mixture_of(server.openai.responses.create(**asked, extra_body=extra))
    assert_shape(told, "blend", "xlora", 8)
    with server.openai.responses.create(**asked, extra_body=extra, stream=True) as stream:
        (completed,) = [event for event in stream if event.type == "response.completed"]
    assert mixture_of(completed.response)["token_gates"] == told["token_gates"]


def test_messages(server: Served) -> None:
    asked = {"model": "arrow", "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "return_mixture": "tokens"}
    whole = server.http.post("/v1/messages", json=asked).raise_for_status().json()
    told = whole["mixture"]
    assert_shape(told, "arrow", "arrow", whole["usage"]["output_tokens"])
    deltas = []
    with server.http.stream("POST", "/v1/messages", json=asked | {"stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {") and (event := json.loads(line[6:]))["type"] == "message_delta":
                deltas.append(event)
    (delta,) = deltas
    assert delta["delta"]["stop_reason"] == whole["stop_reason"]
    assert delta["mixture"]["token_gates"] == told["token_gates"]


def test_a_batch_of_chats(server: Served) -> None:
    body = {"model": "arrow", "messages": [MESSAGES, MESSAGES], "max_tokens": 3, "ignore_eos": True}
    answer = server.http.post("/v1/chat/completions/batch", json=body).raise_for_status().json()
    for choice in answer["choices"]:
        assert_shape(choice["mixture"], "arrow", "arrow", 3)


@pytest.mark.parametrize("name", ["base", "alpha"])
def test_answers_without_a_mixture_say_nothing_of_one(server: Served, name: str) -> None:
    answer = server.openai.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=2, extra_body={"return_mixture": "tokens"}
    )
    assert "mixture" not in (answer.choices[0].model_extra or {})


def test_what_is_wanted_has_to_be_known(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="return_mixture") as failure:
        server.openai.completions.create(model="arrow", prompt=PROMPT, max_tokens=2, extra_body={"return_mixture": 1})
    assert failure.value.code == "invalid_request"


def test_more_gates_than_an_answer_may_have_are_refused(server: Served) -> None:
    def asked(**options: Any) -> Any:
        return server.openai.completions.create(model="arrow", prompt=PROMPT, **options)

    with pytest.raises(openai.BadRequestError, match="gate_values") as failure:
        asked(max_tokens=8000, n=8, extra_body={"return_mixture": "layers"})  # 2 layers, 2 adapters
    assert failure.value.code == "limit_exceeded"
    answer = asked(max_tokens=2, n=8, extra_body={"return_mixture": "layers", "ignore_eos": True})
    assert [len(mixture_of(choice)["layer_gates"]) for choice in answer.choices] == [2] * 8


@pytest.mark.parametrize("model", ["base", "blend"])
def test_weights_of_a_request_are_what_its_answer_tells(server: Served, model: str) -> None:
    names = NAMES if model == "base" else ["0", "1"]
    sent = dict(zip(names, (0.5, -0.25), strict=True))
    answer = server.openai.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=3, extra_body={"mixture": sent, "ignore_eos": True}
    )
    told = mixture_of(answer.choices[0])
    assert_shape(told, model, "fixed", 3)
    assert {name: gate for name, gate in told["gates"].items() if gate} == sent


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_client_that_leaves_ends_its_answer(server: Served, route: str) -> None:
    asked: dict[str, Any] = {"model": "arrow", "max_tokens": 6000, "stream": True, "extra_body": {"ignore_eos": True}}
    if route == "chat":
        stream: Any = server.openai.chat.completions.create(messages=MESSAGES, **asked)
    else:
        stream = server.openai.completions.create(prompt=PROMPT, **asked)
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.status()["router"]["in_flight"] == 0, 20, "nothing is in flight")
