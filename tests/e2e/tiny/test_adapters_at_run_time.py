"""Adapters and bundles come and go while the server runs, over HTTP and from the command line."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import openai
import pytest

from ...models import ADAPTERS, peft_greedy, peft_lora, peft_xlora, tiny_adapter, tiny_bundle
from ..served import TOKENS, Served
from ..weights import Oracle, Weights

pytestmark = pytest.mark.usefixtures("names_as_before")

PROMPT = list(range(90, 150))  # its first page is in the prefix cache when it is asked again
NEW_TOKENS = 12


def assert_gone(server: Served, name: str) -> None:
    assert name not in server.names()
    with pytest.raises(openai.NotFoundError) as raised:
        server.greedy(name, PROMPT)
    assert raised.value.code == "model_not_found"
    assert not any(key.startswith(f"{name}@") for key in server.status()["replicas"][0]["stats"]["adapters"])


@pytest.mark.parametrize("name", ["gamma", "org/gamma"])  # the second as on the hub: never a path
def test_an_added_adapter_serves_at_once_and_a_removed_one_is_gone(
    server: Served, weights: Weights, tmp_path: Path, name: str
) -> None:
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, seed=21, **ADAPTERS[2])
    answer = server.load(name, adapter)
    assert answer.status_code == 200, answer.text
    tokens = server.greedy(name, PROMPT, NEW_TOKENS)
    assert tokens == peft_greedy(peft_lora(weights.base, adapter), PROMPT, NEW_TOKENS)
    cards = {model.id: model.model_extra or {} for model in server.openai.models.list()}
    assert cards[name]["kind"] == "lora"
    listed = {each["name"]: each for each in server.status()["adapters"]}
    assert (listed[name]["rank"], listed[name]["replicas"]) == (ADAPTERS[2]["rank"], 1)

    answer = server.unload(name)
    assert answer.status_code == 200, answer.text
    assert_gone(server, name)


def test_what_is_verified_serves_once_it_has_passed(server: Served, weights: Weights, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, seed=41, **ADAPTERS[0])
    bundle = tiny_bundle(tmp_path / "mix", weights.base, seed=42)
    for name, folder in (("gamma", adapter), ("mix", bundle)):
        answer = server.load(name, folder, verify=True)
        assert answer.status_code == 200, answer.text
        assert len(server.greedy(name, PROMPT, NEW_TOKENS)) == NEW_TOKENS
    held = server.status()["replicas"][0]["stats"]["adapters"]
    assert {key.partition("@")[0] for key in held} == {*weights.adapters, "blend", "arrow", "weighted", "gamma", "mix"}


def test_what_does_not_pass_is_never_served(server: Served, weights: Weights, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, strength=0)
    answer = server.load("gamma", adapter, verify=True)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == "adapter_not_verified"
    assert "Its files change nothing" in error["message"]
    assert_gone(server, "gamma")


def test_adding_the_same_again_changes_nothing(server: Served, weights: Weights) -> None:
    before = server.status()["adapters"]
    assert server.load("alpha", weights.adapters["alpha"]).status_code == 200
    assert server.status()["adapters"] == before


def test_replaced_content_never_answers_from_the_old_ones_cache(
    server: Served, weights: Weights, tmp_path: Path
) -> None:
    for seed in (31, 32):
        adapter = tiny_adapter(tmp_path / str(seed), weights.base, seed=seed, **ADAPTERS[0])
        answer = server.load("gamma", adapter, load_inplace=True)
        assert answer.status_code == 200, answer.text
        tokens = server.greedy("gamma", PROMPT, NEW_TOKENS)
        assert tokens == peft_greedy(peft_lora(weights.base, adapter), PROMPT, NEW_TOKENS)
    held = [key for key in server.status()["replicas"][0]["stats"]["adapters"] if key.startswith("gamma@")]
    assert len(held) == 1


def test_an_added_bundle_takes_overrides(server: Served, weights: Weights, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "mixed", weights.base, seed=41)
    said = tiny_bundle(tmp_path / "said", weights.base, seed=41, top_k=1, temperature=0.5)
    answer = server.load("mixed", bundle, top_k=1, temperature=0.5)
    assert answer.status_code == 200, answer.text
    assert server.greedy("mixed", PROMPT, NEW_TOKENS) == peft_greedy(peft_xlora(weights.base, said), PROMPT, NEW_TOKENS)
    assert {model.id: (model.model_extra or {})["kind"] for model in server.openai.models.list()}["mixed"] == "xlora"
    assert server.unload("mixed").status_code == 200
    assert_gone(server, "mixed")


def test_a_stream_finishes_with_the_adapter_it_began_with(server: Served, weights: Weights, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, seed=51, **ADAPTERS[0])
    assert server.load("gamma", adapter).status_code == 200
    count = 200
    expected = server.greedy("gamma", PROMPT, count)
    statuses: list[int] = []
    tokens: list[int] = []
    remover = threading.Thread(target=lambda: statuses.append(server.unload("gamma").status_code))
    with server.openai.completions.create(
        model="gamma", prompt=PROMPT, max_tokens=count, temperature=0, stream=True, extra_body=TOKENS
    ) as stream:
        for chunk in stream:
            if not remover.ident:
                remover.start()
            for choice in chunk.choices:
                tokens += (choice.model_extra or {}).get("token_ids") or []
    remover.join(60)
    assert tokens == expected
    assert statuses == [200]
    assert_gone(server, "gamma")


def test_many_adapters_more_than_the_engine_has_slots(server: Served, weights: Weights, tmp_path: Path) -> None:
    names = [f"extra-{number}" for number in range(8)]  # with the settings' three: eleven, for eight slots
    expected = {}
    for number, name in enumerate(names):
        adapter = tiny_adapter(tmp_path / name, weights.base, seed=60 + number, **ADAPTERS[1])
        answer = server.load(name, adapter)
        assert answer.status_code == 200, answer.text
        expected[name] = peft_greedy(peft_lora(weights.base, adapter), PROMPT, 6)
    assert {name: server.greedy(name, PROMPT, 6) for name in names} == expected
    assert {name: server.greedy(name, PROMPT, 6) for name in names} == expected
    for name in names:
        assert server.unload(name).status_code == 200


def test_the_command_line_adds_lists_and_removes(
    server: Served, weights: Weights, oracle: Oracle, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path / "gamma", weights.base, seed=71, **ADAPTERS[0])
    added = server.command("adapters", "add", "gamma", str(adapter))
    assert (added.returncode, added.stderr) == (0, "")
    assert server.greedy("gamma", PROMPT, 6) == peft_greedy(peft_lora(weights.base, adapter), PROMPT, 6)

    listed = server.command("adapters", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    kinds = {each["name"]: each["kind"] for each in json.loads(listed.stdout)}
    mixtures = {"blend": "xlora", "arrow": "arrow", "weighted": "fixed"}
    assert kinds == {"alpha": "lora", "beta": "lora", "gamma": "lora"} | mixtures
    assert "gamma" in server.command("adapters", "list").stdout

    status = server.command("status", "--json")
    assert status.returncode == 0, status.stderr
    figures = json.loads(status.stdout)
    assert set(figures) == {"model", "replicas", "adapters", "router", "start_failure"}
    assert figures["replicas"][0]["stats"]["kv_pages_total"] > 0
    table = server.command("status").stdout
    assert all(word in table for word in ("Replicas", "Adapters", "gamma", "ready"))

    removed = server.command("adapters", "remove", "gamma")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert_gone(server, "gamma")
    again = server.command("adapters", "remove", "gamma", "--json")
    assert again.returncode == 2
    assert json.loads(again.stdout)["error"]["code"] == "adapter_not_found"
