"""`xloom chat` and `xloom generate` in one process on the sample, where vLLM, Ray and PEFT can't be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Stands in for an environment of xloom[edge] alone; `nox -s edge` makes a real one.
SHIM = """
import importlib.util
import sys

GONE = {"vllm", "ray", "peft"}
find_spec = importlib.util.find_spec


class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Gone())
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in GONE else find_spec(name, package)
)
"""
QUESTION = "Write a function that adds two numbers."


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of such an environment."""
    folder = tmp_path_factory.mktemp("edge")
    (folder / "sitecustomize.py").write_text(SHIM)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def xloom(edge: dict[str, str], *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xloom.cli", *arguments]
    return subprocess.run(command, env=edge, input=text, capture_output=True, text=True, timeout=300)


def answer(edge: dict[str, str], *arguments: str, text: str | None = None) -> dict[str, Any]:
    done = xloom(edge, *arguments, "--json", text=text)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_shim_hides_what_edge_has_not(edge: dict[str, str]) -> None:
    for name in ("vllm", "ray", "peft"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], env=edge, capture_output=True, text=True)
        assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("model", ["base", "code", "blend"])
def test_chat_answers_as_base_adapter_and_mixture(edge: dict[str, str], model: str) -> None:
    options = ["--model", model, "--max-tokens", "24", "--temperature", "0"]
    found = answer(edge, "chat", "--message", QUESTION, *options)
    assert found["model"] == model
    assert found["text"].strip()
    assert found["finish_reason"] in ("stop", "length")
    assert 0 < found["num_tokens"] <= 24


def test_without_a_model_the_mixture_answers_and_each_model_has_its_own_answer(edge: dict[str, str]) -> None:
    options = ["--max-tokens", "24", "--temperature", "0"]
    texts = {}
    for model in ("base", "code", "blend"):
        texts[model] = answer(edge, "generate", "def add(a, b):", "--model", model, *options)["text"]
    found = answer(edge, "generate", "def add(a, b):", *options)
    assert (found["model"], found["text"]) == ("blend", texts["blend"])
    assert len(set(texts.values())) > 1


def test_a_prompt_through_stdin_streams_text(edge: dict[str, str]) -> None:
    done = xloom(edge, "chat", "--max-tokens", "8", "--temperature", "0", text=QUESTION)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_an_unknown_model_is_refused_before_anything_loads(edge: dict[str, str]) -> None:
    done = xloom(edge, "generate", "hello", "--model", "cod")
    assert done.returncode == 2
    assert "[model_not_found]" in done.stderr
    assert "base, code, docs, json, maths, blend" in done.stderr


def test_a_prompt_too_long_is_a_clear_error(edge: dict[str, str]) -> None:
    done = xloom(edge, "generate", "-", "--model", "base", text="word " * 5000)
    assert done.returncode == 2
    assert "[context_length_exceeded]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_help_has_an_example(edge: dict[str, str], command: str) -> None:
    done = xloom(edge, command, "--help")
    assert done.returncode == 0
    assert f"example: xloom {command}" in done.stdout


def test_nothing_heavy_is_imported_to_say_what_there_is(edge: dict[str, str]) -> None:
    code = "import sys, xloom.cli; xloom.cli.build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=edge, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm", "ray"} & set(done.stdout.split())
