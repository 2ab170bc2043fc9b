"""Mixtures of adapters named in the settings, and weights in requests, through OpenAI's own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.models import load_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.reference import OnePassReference
from xloom.protocol import Blend

from ..served import TOKENS, Served
from ..weights import Oracle, Weights
from .conftest import MIXTURES

PROMPT = tuple(range(41, 86))
MESSAGES: Any = [{"role": "user", "content": "What is woven?"}]
WEIGHTS = {"alpha": 0.5, "beta": -0.75}


def reference(weights: Weights, folder: Path, number: int, sent: dict[str, float] | None = None) -> OnePassReference:
    options = {key: value for key, value in MIXTURES[number].items() if key not in ("name", "adapters")}
    blend = Blend(**({"routing": "arrow", "adapters": {}} | options))  # type: ignore[arg-type]
    modules = linear_modules(str(weights.base))
    prepare_mixture(blend, weights.adapters, modules, folder / "prepared", max_rank=64)
    return OnePassReference.load(load_model(weights.base), folder / "prepared", sent)


def test_arrow_is_served_as_the_reference_has_it(server: Served, weights: Weights, tmp_path: Path) -> None:
    assert server.greedy("arrow", list(PROMPT)) == reference(weights, tmp_path, 0).greedy(PROMPT, 16)


def test_constants_of_the_settings_are_the_gates(server: Served, oracle: Oracle) -> None:
    assert server.greedy("weighted", list(PROMPT)) == oracle("alpha", PROMPT, 16)


def test_weights_in_a_completion(server: Served, weights: Weights, oracle: Oracle, tmp_path: Path) -> None:
    def asked(sent: dict[str, float]) -> Any:
        answer = server.openai.completions.create(
            model="weighted", prompt=list(PROMPT), max_tokens=16, temperature=0, extra_body=TOKENS | {"mixture": sent}
        )
        return (answer.choices[0].model_extra or {})["token_ids"]

    assert asked({"beta": 1}) == oracle("beta", PROMPT, 16)
    assert asked(WEIGHTS) == reference(weights, tmp_path, 1, WEIGHTS).greedy(PROMPT, 16)
    assert server.greedy("weighted", list(PROMPT)) == oracle("alpha", PROMPT, 16)


@pytest.mark.parametrize("route", ["chat", "stream", "responses"])
def test_weights_on_the_other_routes(server: Served, route: str) -> None:
    def asked(model: str, **extra: Any) -> str:
        body = {"ignore_eos": True} | extra
        if route == "responses":
            answer = server.openai.responses.create(
                model=model, input="What is woven?", max_output_tokens=12, temperature=0, extra_body=body
            )
            return answer.output_text
        chat = server.openai.chat.completions
        if route == "chat":
            whole = chat.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0, extra_body=body)
            return whole.choices[0].message.content or ""
        with chat.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0, stream=True, extra_body=body
        ) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    beta = asked("weighted", mixture={"beta": 1})
    assert beta == asked("beta")
    assert beta != asked("weighted") == asked("alpha")


@pytest.mark.parametrize(
    ("model", "sent", "said"),
    [
        ("weighted", {"gamma": 1}, "alpha, beta"),
        ("weighted", {}, "empty"),
        ("weighted", {"alpha": 1e9}, "100"),
        ("weighted", {"alpha": "much"}, "can't be read"),
        ("weighted", [1, 2], "can't be read"),
        ("alpha", {"alpha": 1}, "takes none"),
        ("arrow", {"gamma": 1}, "alpha, beta"),
        ("blend", {"alpha": 1}, "0, 1"),
        ("base", {"gamma": 1}, "Adapters are: alpha, beta"),
        ("base", {"arrow": 1}, "Mixtures can't be mixed"),
        ("base", {}, "empty"),
        ("base", {"alpha": 1, "beta": -101}, "-100 to 100"),
        ("base", {f"adapter-{number}": 1 for number in range(33)}, "33 adapters"),
    ],
)
def test_weights_that_make_no_sense_are_refused(server: Served, model: str, sent: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as failure:
        server.openai.completions.create(model=model, prompt=list(PROMPT), max_tokens=2, extra_body={"mixture": sent})
    assert failure.value.code == "invalid_weights"
