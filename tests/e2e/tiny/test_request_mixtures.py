"""Weights of a request's own, on the base model's name and on any mixture's, through OpenAI's own client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.models import load_model, peft_greedy, peft_lora, tiny_adapter
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.reference import OnePassReference
from xloom.protocol import Blend

from ..served import ADMIN_KEY, TOKENS, Served
from ..weights import Oracle, Weights

pytestmark = pytest.mark.usefixtures("names_as_before")

PROMPT = tuple(range(43, 143))  # three pages, which all weights would share
WEIGHTS = {"alpha": 0.5, "beta": -0.75}
MESSAGES: Any = [{"role": "user", "content": "What is woven?"}]


def tokens(server: Served, sent: dict[str, float], model: str = "base", count: int = 12) -> list[int]:
    answer = server.openai.completions.create(
        model=model, prompt=list(PROMPT), max_tokens=count, temperature=0, extra_body=TOKENS | {"mixture": sent}
    )
    assert answer.model == model
    extra = answer.choices[0].model_extra or {}
    told = extra["mixture"]
    assert (told["name"], told["routing"], told["adapters"]) == (model, "fixed", sorted(told["adapters"]))
    assert told["gates"] == pytest.approx(dict.fromkeys(told["adapters"], 0.0) | sent)
    found: list[int] = extra["token_ids"]
    return found


@pytest.fixture(scope="module")
def prepared(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "prepared"
    prepare_mixture(Blend("fixed", {}), weights.adapters, linear_modules(str(weights.base)), folder, max_rank=64)
    return folder


def test_served_adapters_mix_on_the_base_models_name(
    server: Served, weights: Weights, prepared: Path, oracle: Oracle
) -> None:
    model = load_model(weights.base)
    plain = server.greedy("base", list(PROMPT), 12)
    for sent in (WEIGHTS, {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}, {"alpha": 2.5, "beta": 1.0}):
        expected = OnePassReference.load(model, prepared, sent).greedy(PROMPT, 12)
        assert tokens(server, sent) == tokens(server, dict(reversed(sent.items()))) == expected
    assert tokens(server, {"beta": 1}) == oracle("beta", PROMPT, 12)
    assert tokens(server, {"beta": 0}) == plain == server.greedy("base", list(PROMPT), 12)
    assert server.names() == ["base", "alpha", "beta", "blend", "arrow", "weighted"]


def test_weights_take_the_place_of_any_mixtures_gates(server: Served, weights: Weights, oracle: Oracle) -> None:
    for name in ("alpha", "beta"):
        assert tokens(server, {name: 1}, "arrow") == oracle(name, PROMPT, 12)
    own = peft_lora(weights.base, weights.bundle / "1")
    assert tokens(server, {"1": 1}, "blend") == peft_greedy(own, PROMPT, 12)
    assert server.greedy("blend", list(PROMPT), 12) == oracle("blend", PROMPT, 12)


def test_different_weights_share_a_batch(server: Served) -> None:
    sent = [{"alpha": number / 4 - 1, "beta": 1 - number / 8} for number in range(12)]
    alone = [tokens(server, each, count=24) for each in sent]
    with ThreadPoolExecutor(len(sent)) as pool:
        assert list(pool.map(lambda each: tokens(server, each, count=24), sent)) == alone
    assert len({tuple(each) for each in alone}) > 6


@pytest.mark.parametrize("route", ["chat", "stream", "responses", "messages"])
def test_all_routes_take_weights_on_the_base_models_name(server: Served, route: str) -> None:
    def asked(model: str, **extra: Any) -> str:
        if route == "messages":
            body = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | extra
            answer = server.http.post("/v1/messages", json=body)
            assert answer.status_code == 200, answer.text
            text: str = answer.json()["content"][0]["text"]
            return text
        if route == "responses":
            return server.openai.responses.create(
                model=model, input="What is woven?", max_output_tokens=12, temperature=0, extra_body=extra
            ).output_text
        options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "extra_body": extra}
        chat = server.openai.chat.completions
        if route == "chat":
            return chat.create(**options).choices[0].message.content or ""
        with chat.create(**options, stream=True) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    beta = asked("base", mixture={"beta": 1, "alpha": 0})
    assert beta == asked("beta")
    assert beta != asked("base")


def test_the_command_line_mixes_replaces_and_removes(
    server: Served, weights: Weights, prepared: Path, oracle: Oracle
) -> None:
    mixed = server.command("mix", "routed", "--routing", "arrow", "alpha", "beta", "--top-k", "1", "--json")
    assert (mixed.returncode, mixed.stderr) == (0, "")
    told = json.loads(mixed.stdout)
    assert (told["name"], told["routing"], told["adapters"]) == ("routed", "arrow", ["alpha", "beta"])
    assert [set(each) for each in told["gates"]] == [{"alpha", "beta"}] * 4
    assert isinstance(told["near_uniform"], bool)
    assert server.greedy("routed", list(PROMPT), 12) == server.greedy("arrow", list(PROMPT), 12)
    assert tokens(server, {"beta": 1}, "routed") == oracle("beta", PROMPT, 12)
    card = next(card for card in server.openai.models.list() if card.id == "routed")
    assert (card.model_extra or {})["adapters"] == ["alpha", "beta"]

    taken = server.command("mix", "routed", "--weights", "alpha=0.5", "beta=-0.75")
    assert taken.returncode == 2
    assert "[adapter_exists]" in taken.stderr
    replaced = server.command("mix", "routed", "--weights", "alpha=0.5", "beta=-0.75", "--replace")
    assert (replaced.returncode, replaced.stderr) == (0, "")
    assert "fixed" in replaced.stdout
    expected = OnePassReference.load(load_model(weights.base), prepared, WEIGHTS).greedy(PROMPT, 12)
    assert server.greedy("routed", list(PROMPT), 12) == expected

    removed = server.command("mix", "--remove", "routed")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert "routed" not in server.names()
    with pytest.raises(openai.NotFoundError):
        server.greedy("routed", list(PROMPT))


def test_mixtures_are_changed_with_the_admin_key_alone(server: Served) -> None:
    body = {"name": "both", "adapters": ["alpha", "beta"]}
    assert server.http.post("/xloom/mixtures", json=body).json()["error"]["code"] == "admin_key_required"
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}

    def refused(**changed: Any) -> str:
        answer = server.http.post("/xloom/mixtures", json=body | changed, headers=headers)
        assert answer.status_code in (400, 404), answer.text
        code: str = answer.json()["error"]["code"]
        return code

    assert refused(adapters=["alpha", "poems"]) == "adapter_not_found"
    assert refused(adapters=["alpha", "blend"]) == "invalid_mixture"
    assert refused(adapters=["alpha"]) == "invalid_request"
    assert refused(routing="fixed", weights={"poems": 1}) == "invalid_weights"
    assert refused(top_k=3) == "invalid_mixture"


def test_an_adapter_that_has_just_come_is_mixed_and_one_that_is_gone_is_not(
    server: Served, weights: Weights, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, seed=91, rank=40)
    assert server.load("gamma", adapter).status_code == 200
    assert tokens(server, {"gamma": 1, "alpha": 0}, count=6) == peft_greedy(peft_lora(weights.base, adapter), PROMPT, 6)
    other = tiny_adapter(tmp_path / "delta", weights.base, seed=92, rank=40)
    assert server.load("delta", other).status_code == 200
    with pytest.raises(openai.BadRequestError, match="add up to 80") as wide:
        tokens(server, {"gamma": 1, "delta": 1})
    assert wide.value.code == "rank_too_large"
    again = tiny_adapter(tmp_path / "again", weights.base, seed=93, rank=40)
    assert server.load("gamma", again, load_inplace=True).status_code == 200
    assert tokens(server, {"gamma": 1, "alpha": 0}, count=6) == peft_greedy(peft_lora(weights.base, again), PROMPT, 6)
    assert server.unload("gamma").status_code == 200
    with pytest.raises(openai.BadRequestError, match="gamma") as gone:
        tokens(server, {"gamma": 1, "alpha": 0})
    assert gone.value.code == "invalid_weights"
    assert server.http.get("/xloom/adapters").text.count('"+') == 0
