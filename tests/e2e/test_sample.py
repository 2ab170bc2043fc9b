"""`xloom serve` without settings: the sample model as it is shipped, compiled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from xloom.settings import load_settings

from .served import Served

pytestmark = pytest.mark.slow

FOREIGN = re.compile(r"INFO|WARNING|ERROR|\(raylet\)|Traceback")
SETTINGS = load_settings(None)
NAMES = ["base", *(entry.name for entry in [*SETTINGS.adapters, *SETTINGS.xlora])]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sample")
    # The sample's stores are under the home folder; what vLLM has compiled there may be used again.
    (folder / "home").mkdir()
    compiled = os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm"))
    served = Served(folder, None, port=0, HOME=str(folder / "home"), VLLM_CACHE_ROOT=compiled)
    served.wait_ready()
    yield served
    served.stop()
    # Ray, Serve and vLLM have their own logs: whoever types the command reads ours.
    assert not FOREIGN.search(served.printed()), served.printed()


def test_every_name_is_listed_with_its_kind(server: Served) -> None:
    kinds = {model.id: (model.model_extra or {})["kind"] for model in server.openai.models.list()}
    assert kinds == {
        "base": "base",
        **{entry.name: "lora" for entry in SETTINGS.adapters},
        **{entry.name: "xlora" for entry in SETTINGS.xlora},
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_chat_says_something(server: Served, name: str) -> None:
    with server.openai.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "Write a function that reads a file."}],
        max_tokens=48,
        temperature=0,
        stream=True,
    ) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text.strip()
