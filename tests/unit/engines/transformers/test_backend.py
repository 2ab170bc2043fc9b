"""The transformers backend beyond what every backend must do (tests/conformance): PEFT's answers, limits, failures."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.served import ANSWER_S, Served, wait_for
from tests.models import (
    HIDDEN,
    adapters_for,
    peft_greedy,
    peft_logits,
    peft_xlora,
    tiny_adapter,
    tiny_bundle,
    tiny_model,
)
from tests.models import load_model as load_reference
from xloom.engines.transformers import backend as module
from xloom.engines.transformers import worker
from xloom.engines.transformers.backend import TransformersBackend
from xloom.engines.transformers.batch import BatchRunner
from xloom.engines.transformers.model import choose_device, choose_dtype, load_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.mixtures.prepare_mixture import prepare_mixture
from xloom.mixtures.reference import OnePassReference, Reference
from xloom.protocol import AdapterRef, Blend, Overrides, XloomError
from xloom.settings import EngineSettings, IsqSettings, ModelSettings

PROMPT = list(range(40, 75))
NEW_TOKENS = 12
GRID: dict[str, dict[str, Any]] = {
    "default": {},
    "one-gate-a-token": {"layerwise": False, "depth": 2},
    "top-2-softmax": {"top_k": 2, "softmax_topk": True},
    "adapters-in-scaling-pass": {"scaling_pass_value": 0.3},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing by more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture
def served(model: Path) -> Iterator[Served]:
    engine = Served(TransformersBackend, model, xlora=True, extra_args={"device": "cpu"})
    yield engine
    engine.close()


def started(model: Path, **settings: Any) -> Served:
    return Served(TransformersBackend, model, xlora=True, **({"extra_args": {"device": "cpu"}} | settings))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma3"])
def test_cached_xlora_equals_peft_which_recomputes(architecture: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", architecture)
    engine = started(folder)
    try:
        for name, options in GRID.items():
            bundle = tiny_bundle(tmp_path / name, folder, adapters=adapters_for(architecture), seed=3, **options)
            answer = engine.generate(PROMPT, engine.bundle(name, bundle), max_tokens=NEW_TOKENS, logprobs=8)
            oracle = peft_xlora(folder, bundle)
            assert answer.tokens == peft_greedy(oracle, PROMPT, NEW_TOKENS)
            logits = peft_logits(oracle, PROMPT + answer.tokens)[len(PROMPT) - 1 : -1]
            expected = torch.log_softmax(logits, dim=-1)
            for position, candidates in enumerate(answer.logprobs):
                for token, value in candidates.items():
                    assert value == pytest.approx(expected[position, token].item(), abs=1e-3)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["xlora", "arrow", "fixed"])
def test_gates_come_with_the_tokens(model: Path, served: Served, tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(worker, "PREFILL_TOKENS", 20)  # the prompt in pieces
    prepared = tmp_path / "prepared"
    if kind == "xlora":
        bundle = tiny_bundle(tmp_path / "blend", model, seed=3)
        prepare_bundle(bundle, linear_modules(str(model)), prepared, hidden_size=HIDDEN, max_rank=256)
    else:
        specs = enumerate(adapters_for("llama"))
        adapters = {f"a{i}": tiny_adapter(tmp_path / f"a{i}", model, seed=i, **spec) for i, spec in specs}
        prepare_mixture(Blend(kind, {}), adapters, linear_modules(str(model)), prepared, max_rank=256)
    ref = served.add(AdapterRef("mixed", "1", kind), prepared)
    started = [served.start(PROMPT, each, layer_gates=True, max_tokens=6)[1] for each in (ref, None, ref)]
    first, base, second = [future.result(ANSWER_S) for future in started]
    ids = PROMPT + first.tokens[:-1]
    one_pass = kind != "xlora"
    reference: Any = (OnePassReference if one_pass else Reference).load(load_reference(model), prepared)
    expected = reference.gates_of(ids) if one_pass else reference.gates(ids)
    asked = len(PROMPT) - 1
    for answer in (first, second):
        tokens = torch.stack([torch.frombuffer(bytearray(each.tokens), dtype=torch.float32) for each in answer.gates])
        torch.testing.assert_close(tokens, expected[asked:].mean(1), atol=1e-3, rtol=0)
        told = answer.gates[0]
        assert told.prompt_tokens == asked
        prompt = torch.frombuffer(bytearray(told.prompt), dtype=torch.float32)
        torch.testing.assert_close(prompt, expected[:asked].mean((0, 1)), atol=1e-3, rtol=0)
        layers = torch.frombuffer(bytearray(told.layers), dtype=torch.float32).view(2, -1)
        torch.testing.assert_close(layers, expected[asked].view(2, 7, -1).mean(1), atol=1e-3, rtol=0)
    assert base.gates == []


def test_an_architecture_that_is_not_packed_gives_the_same_answers(model: Path, served: Served, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "blend", model, seed=3)
    one_by_one = started(model, extra_args={"device": "cpu", "batching": False})
    try:
        answers = []
        for engine in (served, one_by_one):
            ref = engine.bundle("blend", bundle)
            futures = [engine.start(PROMPT, kind, max_tokens=NEW_TOKENS)[1] for kind in (None, ref, None, ref)]
            answers.append([future.result(ANSWER_S).tokens for future in futures])
        assert answers[0] == answers[1]
    finally:
        one_by_one.close()


def test_prompts_longer_than_a_step_run_in_pieces(model: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = served.generate(PROMPT * 3, max_tokens=4, prompt_logprobs=1)
    monkeypatch.setattr("xloom.engines.transformers.worker.PREFILL_TOKENS", 16)
    futures = [served.start(PROMPT * 3, max_tokens=4, prompt_logprobs=1)[1] for _ in range(3)]
    assert [future.result(ANSWER_S).tokens for future in futures] == [whole.tokens] * 3


def test_prompt_log_probabilities_come_with_the_first_token(model: Path, served: Served) -> None:
    chunks = []
    take = served.backend._hand_over  # type: ignore[attr-defined]
    served.backend._worker._emit = lambda step: (chunks.extend(step), take(step))  # type: ignore[attr-defined]
    served.generate(PROMPT, max_tokens=3, prompt_logprobs=2)
    found = chunks[0].prompt_logprobs
    assert [row[0] for row in found.token_ids] == PROMPT[1:]
    assert {len(row) for row in found.token_ids} == {3}
    assert all(chunk.prompt_logprobs is None for chunk in chunks[1:])


def test_requests_beyond_the_limit_wait(served: Served) -> None:
    futures = [served.start(PROMPT, max_tokens=90)[1] for _ in range(12)]  # served.py runs 8 at once
    wait_for(lambda: served.backend.stats().running == 8, "eight running")
    assert served.backend.stats().waiting == 4
    for future in futures:
        future.result(ANSWER_S)


def test_a_request_starts_once_its_whole_length_fits(model: Path) -> None:
    engine = started(model, paged_attention={"block_size": 16, "max_blocks": 8})  # 128 tokens
    try:
        futures = [engine.start(PROMPT, max_tokens=29)[1] for _ in range(4)]  # 64 each at their longest
        # They count as running before their first step, which is what takes pages.
        wait_for(lambda: (stats := engine.backend.stats()).running == 2 and stats.kv_pages_used > 0, "two running")
        stats = engine.backend.stats()
        assert (stats.waiting, stats.kv_pages_total) == (2, 8)
        assert stats.kv_pages_used <= 8
        assert [len(future.result(ANSWER_S).tokens) for future in futures] == [29] * 4
        lone = engine.generate(PROMPT, max_tokens=90)  # all there is
        assert len(lone.tokens) == 90
    finally:
        engine.close()


def test_a_step_that_fails_is_retried_request_by_request_and_one_alone_ends(
    model: Path, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = served.generate(PROMPT, max_tokens=20).tokens
    poison = [11] * 9
    run = BatchRunner.run

    def failing(self: BatchRunner, parts: Any) -> Any:
        if any(list(part.tokens)[:9] == poison for part in parts):
            run(self, parts)  # the caches have grown when it fails
            raise RuntimeError("out of memory")
        return run(self, parts)

    monkeypatch.setattr(BatchRunner, "run", failing)
    good = [served.start(PROMPT, max_tokens=20)[1] for _ in range(3)]
    _, bad = served.start(poison, max_tokens=20)
    assert [future.result(ANSWER_S).tokens for future in good] == [alone] * 3
    assert (bad.result(ANSWER_S).finish_reason, bad.result().tokens) == ("error", [])
    served.call(served.backend.check_health())


def test_a_thread_that_dies_is_unhealthy(model: Path) -> None:
    engine = started(model)
    engine.backend._worker._step = lambda: 1 / 0  # type: ignore[attr-defined]
    engine.start(PROMPT)
    wait_for(lambda: not engine.backend._worker.alive, "the thread's end")  # type: ignore[attr-defined]
    with pytest.raises(XloomError) as caught:
        engine.call(engine.backend.check_health())
    assert caught.value.code == "engine_dead"
    engine.close()


def test_a_request_keeps_an_adapter_removed_while_it_runs(model: Path, served: Served, tmp_path: Path) -> None:
    ref = served.adapter("leaving", tiny_adapter(tmp_path / "leaving", model, seed=5))
    tokens = served.generate(PROMPT, ref, max_tokens=40).tokens
    request_id, future = served.start(PROMPT, ref, max_tokens=40)
    wait_for(lambda: bool(served.answers[request_id].tokens), "a first token")
    served.call(served.backend.remove_adapter(ref))
    assert future.result(ANSWER_S).tokens == tokens


def test_a_bundle_routed_in_one_pass_is_refused_rather_than_served_in_two(
    model: Path, served: Served, tmp_path: Path
) -> None:
    bundle, prepared = tiny_bundle(tmp_path / "bundle", model), tmp_path / "prepared"
    once = Overrides(routing_passes=1)
    prepare_bundle(bundle, linear_modules(str(model)), prepared, hidden_size=64, max_rank=64, overrides=once)
    with pytest.raises(XloomError) as caught:
        served.add(AdapterRef("single", "0123abcd", "xlora"), prepared)
    assert caught.value.code == "unsupported_by_backend"


def test_an_adapter_of_another_model_is_refused(served: Served, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", "phi3")
    adapter = tiny_adapter(tmp_path / "adapter", other, targets=("qkv_proj",))
    stranger = started(other)
    try:
        stranger.adapter("stranger", adapter)
    finally:
        stranger.close()
    with pytest.raises(XloomError) as caught:
        served.add(AdapterRef("stranger", "0123abcd", "lora"), tmp_path / "adapter-prepared")
    assert caught.value.code == "wrong_base"


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        ({"extra_args": {"gpu_memory_utilization": 0.9}}, "unknown_engine_argument"),
        ({"tensor_parallel_size": 2}, "unsupported_setting"),
        ({"extra_args": {"device": "tpu"}}, "device_missing"),
    ],
)
def test_what_it_cannot_do_is_refused_at_load(model: Path, engine: dict[str, Any], code: str) -> None:
    with pytest.raises(XloomError) as caught:
        load_model(ModelSettings(source=str(model)), EngineSettings(**engine))
    assert caught.value.code == code


def test_a_folder_without_safetensors_is_not_loaded(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(XloomError) as caught:
        load_model(ModelSettings(source=str(tmp_path)), EngineSettings(dtype="float32"))
    assert caught.value.code == "model_not_loadable"


async def test_isq_is_refused(model: Path) -> None:
    with pytest.raises(XloomError) as caught:
        await TransformersBackend.load(
            ModelSettings(source=str(model)), EngineSettings(), xlora=False, max_lora_rank=8, isq=IsqSettings()
        )
    assert caught.value.code == "unsupported_by_backend"


def test_the_context_is_the_models_own_where_more_is_asked(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "xloom"):
        loaded = load_model(ModelSettings(source=str(model)), EngineSettings(max_model_len=100_000, dtype="float32"))
    assert loaded.max_model_len == 512
    assert "lowered" in caplog.text


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TransformersBackend.missing() is None
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert "xloom[edge]" in (TransformersBackend.missing() or "")


def test_device_and_dtype_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None).type == "cpu"
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("metal").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None).type == "cuda"
    assert choose_device("cuda:1").index == 1


def test_its_thread_is_no_one_to_wait_for(model: Path) -> None:
    engine = started(model)
    engine.close()
    assert not any(thread.name == "xloom-transformers" for thread in threading.enumerate())
