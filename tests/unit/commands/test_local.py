"""The model of a settings file in this process: what it is asked, what it answers, and that it ends clean."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.conformance.served import wait_for
from tests.models import load_model, peft_greedy, peft_lora, peft_xlora, tiny_adapter, tiny_bundle, tiny_model
from xloom.commands.local import LocalModel, local_backend, sampling_defaults
from xloom.commands.text_model import Options
from xloom.engines.transformers.backend import TransformersBackend
from xloom.engines.transformers.batch import BatchRunner
from xloom.protocol import XloomError
from xloom.settings import Settings, parse_settings

OPTIONS = Options(max_tokens=12, temperature=0.0)
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing by more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter and a bundle."""
    folder = tmp_path_factory.mktemp("local")
    base = tiny_model(folder / "base", "llama")
    tiny_adapter(folder / "code", base, seed=7)
    tiny_bundle(folder / "blend", base, seed=3)
    return folder


def settings_of(folder: Path, **engine: Any) -> Settings:
    return parse_settings(
        {
            "model": {"source": str(folder / "base")},
            "engine": {"dtype": "float32", "max_model_len": 256, "extra_args": {"device": "cpu"}} | engine,
            "adapters": [{"name": "code", "source": str(folder / "code")}],
            "xlora": [{"name": "blend", "source": str(folder / "blend")}],
        }
    )


@pytest.fixture
def model(folder: Path) -> Iterator[LocalModel]:
    local = LocalModel(settings_of(folder))
    yield local
    local.close()
    assert not any(thread.name.startswith("xloom") for thread in threading.enumerate())


def test_in_one_process_transformers_comes_first_unless_another_is_named() -> None:
    assert local_backend(parse_settings({})) is TransformersBackend
    other = "tests.fakes:FakeBackend"
    assert local_backend(parse_settings({"engine": {"backend": other}})).__name__ == "FakeBackend"


def test_base_adapter_and_bundle_answer_as_peft_does(folder: Path, model: LocalModel) -> None:
    assert (model.names, model.default) == (["base", "code", "blend"], "blend")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    base = folder / "base"
    oracles = {
        "base": load_model(base),
        "code": peft_lora(base, folder / "code"),
        "blend": peft_xlora(base, folder / "blend"),
    }
    for name, oracle in oracles.items():
        answer = model.complete(PROMPT, name, OPTIONS)
        text = "".join(answer.pieces)
        expected = peft_greedy(oracle, tokenizer(PROMPT).input_ids, answer.num_tokens)
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.finish_reason in ("stop", "length")


def test_chat_goes_through_the_models_template(model: LocalModel) -> None:
    asked: list[list[int]] = []
    answer = model._answer
    model._answer = lambda prompt, *rest: (asked.append(prompt), answer(prompt, *rest))[1]  # type: ignore[method-assign]
    list(model.chat([{"role": "user", "content": "hi"}], "base", OPTIONS).pieces)
    assert model._tokenizer.decode(asked[0]) == "user: hi\nassistant: "


def test_a_model_without_a_template_cannot_chat(model: LocalModel) -> None:
    model.prepare("base")
    model._tokenizer.chat_template = None
    with pytest.raises(XloomError) as caught:
        model.chat([{"role": "user", "content": "hi"}], "base", OPTIONS)
    assert caught.value.code == "no_chat_template"


def test_an_answer_cut_short_frees_the_engine(model: LocalModel) -> None:
    answer = model.complete(PROMPT, "base", Options(max_tokens=200, temperature=0.0))
    next(answer.pieces)
    answer.pieces.close()
    backend = model._backend
    assert backend is not None
    wait_for(lambda: backend.stats().running == 0, "nothing running")
    assert model._streams == {}


def test_errors_of_the_engine_reach_the_reader(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(XloomError) as caught:
        list(model.complete("word " * 300, "base", OPTIONS).pieces)
    assert caught.value.code == "context_length_exceeded"

    def fail(self: BatchRunner, parts: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchRunner, "run", fail)
    with pytest.raises(XloomError) as caught:
        list(model.complete(PROMPT, "base", OPTIONS).pieces)
    assert caught.value.code == "generation_failed"
    assert model._streams == {}


def test_the_models_own_sampling_is_what_vllms_front_end_would_take(folder: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    written = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [257, 260], "max_length": 99}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    found = sampling_defaults(parse_settings({"model": {"source": str(tmp_path)}}), tokenizer)
    assert found == {
        "temperature": 0.6,
        "top_p": 0.9,
        "_eos_token_id": 257,
        "stop_token_ids": [260],
        "_all_stop_token_ids": [257, 260],
    }


def test_a_model_without_a_generation_config_ends_at_its_tokenizers_end(folder: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    found = sampling_defaults(parse_settings({"model": {"source": str(tmp_path)}}), tokenizer)
    assert found == {"_eos_token_id": 257, "stop_token_ids": [], "_all_stop_token_ids": [257]}


def test_a_folder_without_a_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    local = LocalModel(parse_settings({"model": {"source": str(tmp_path)}}))
    with pytest.raises(XloomError) as caught:
        local.prepare("base")
    local.close()
    assert caught.value.code == "tokenizer_not_loadable"
