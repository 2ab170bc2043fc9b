"""The transformers backend behind the router, as a server and as `xloom generate` in one process see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from xloom.cli import main

from .served import API_KEY, Served
from .weights import Oracle, Weights, settings_for

PROMPT = tuple(range(40, 75))
NEW_TOKENS = 16
NAMES = ["base", "alpha", "beta", "blend"]


@pytest.fixture(scope="module")
def server(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = settings_for(weights, engine={"backend": "transformers"})
    served = Served(tmp_path_factory.mktemp("edge"), settings)
    served.wait_ready()
    yield served
    served.stop()


@pytest.mark.parametrize("name", NAMES)
def test_served_tokens_equal_pefts(server: Served, oracle: Oracle, name: str) -> None:
    assert server.greedy(name, list(PROMPT), NEW_TOKENS) == oracle(name, PROMPT, NEW_TOKENS)


@pytest.mark.parametrize("name", ["base", "blend"])
def test_in_process_and_at_the_url_the_text_is_the_same(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Weights, name: str
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(settings_for(weights)))  # JSON is YAML
    options = ["--model", name, "--max-tokens", "24", "--temperature", "0", "--json"]
    answers = []
    for where in ([str(file)], ["--url", server.url, "--api-key", API_KEY]):
        assert main(["generate", *where, "--prompt", "abc def", *options]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert answers[0]["num_tokens"] == 24


def test_what_the_backend_cannot_do_is_refused_in_openais_shape(server: Served) -> None:
    body = {"model": "base", "prompt": "abc", "max_tokens": 4, "structured_outputs": {"json": "{}"}}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "unsupported_sampling"
    assert "structured_outputs" in error["message"]
