"""`xloom serve` without settings: the sample model as it is shipped, compiled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from xloom.settings import load_settings

from ..pages import Reader, to_run
from .served import Served

pytestmark = pytest.mark.slow

FOREIGN = re.compile(r"INFO|WARNING|ERROR|\(raylet\)|Traceback")
SETTINGS = load_settings(None)
NAMES = ["base", *SETTINGS.names]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server is started, so that adapters below may be added at run time."""
    return tmp_path_factory.mktemp("checkout")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sample")
    # The sample's stores are under the home folder; what vLLM has compiled there may be used again.
    (folder / "home").mkdir()
    compiled = os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm"))
    served = Served(folder, None, port=0, cwd=checkout, HOME=str(folder / "home"), VLLM_CACHE_ROOT=compiled)
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
        **{entry.name: entry.routing for entry in SETTINGS.mixtures},
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


def test_the_readmes_commands_mix_adapters(server: Served, checkout: Path) -> None:
    """As they stand, but for the address, and for a router that is trained in two short steps."""
    url = f"http://127.0.0.1:{server.port}"
    names = {
        "http://127.0.0.1:8000": url,
        "source .venv/bin/activate": "",
        "xloom mix": f"xloom mix --url {url}",
        "xloom adapters add": f"xloom adapters add --url {url}",
        "--out ./trained": "--steps 2 --batch 2 --length 64 --out ./trained",
    }
    reader = Reader(checkout, os.environ | {"HF_HUB_OFFLINE": "1"}, names)
    said = "".join(reader.run(block) for block in to_run("../README.md", "## Mix"))
    assert '"routing":"fixed"' in said  # of the curl's answer, which asked the base model with weights
    kinds = {model.id: (model.model_extra or {})["kind"] for model in server.openai.models.list()}
    assert kinds["manual"] == "arrow"
    assert kinds["trained"] == "linear"
