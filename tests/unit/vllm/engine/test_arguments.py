"""Settings to vLLM's engine arguments: names, units and what differs on CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_model
from xloom.protocol import XloomError
from xloom.settings import EngineSettings, ModelSettings
from xloom.vllm.engine.arguments import bind_threads, engine_arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return ModelSettings(source=str(tiny_model(tmp_path_factory.mktemp("model"), "llama")), served_name="named")


def arguments(
    model: ModelSettings, *, device: str = "cpu", xlora: bool = False, rank: int = 16, **engine: Any
) -> dict[str, Any]:
    return engine_arguments(model, EngineSettings(**engine), xlora=xlora, max_lora_rank=rank, device=device)


def test_cpu_rounds_the_page_up_keeps_the_tokens_and_warns(
    model: ModelSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = arguments(model, dtype="float32")
    assert (made["block_size"], made["num_gpu_blocks_override"]) == (32, 2048)  # 4,096 pages of 16 tokens
    assert "rounded up to 32" in caplog.text
    assert "gpu_memory_utilization" not in made


def test_cpu_memory_is_in_bytes_and_doubles_with_xlora(model: ModelSettings) -> None:
    plain = arguments(model, dtype="float32", paged_attention={"block_size": 32, "max_blocks": 10})
    # keys and values, 2 layers, 2 KV heads of 32, 4 bytes, 32 tokens a page, 10 pages
    assert plain["kv_cache_memory_bytes"] == 2 * 2 * 2 * 32 * 4 * 32 * 10
    both = arguments(model, dtype="float32", xlora=True, paged_attention={"block_size": 32, "max_blocks": 10})
    assert both["kv_cache_memory_bytes"] == 2 * plain["kv_cache_memory_bytes"]


def test_gpu_takes_the_memory_fraction_and_pages_only_when_told(model: ModelSettings) -> None:
    made = arguments(model, device="cuda", paged_attention={"gpu_memory_fraction": 0.7})
    assert (made["gpu_memory_utilization"], made["block_size"], made["dtype"]) == (0.7, 16, "auto")
    assert not {"num_gpu_blocks_override", "kv_cache_memory_bytes"} & set(made)
    assert arguments(model, device="cuda", paged_attention={"max_blocks": 99})["num_gpu_blocks_override"] == 99


def test_xlora_chooses_the_model_class_and_piecewise_graphs_on_gpu(model: ModelSettings) -> None:
    made = arguments(model, device="cuda", xlora=True)
    assert made["hf_overrides"] == {"architectures": ["XLoraLlamaForCausalLM"]}
    assert made["compilation_config"] == {"cudagraph_mode": "PIECEWISE"}
    assert "hf_overrides" not in arguments(model, device="cuda")


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (5, 8), (36, 64), (300, 320)])
def test_ranks_are_padded_to_what_vllm_allows(model: ModelSettings, rank: int, allowed: int) -> None:
    assert arguments(model, rank=rank)["max_lora_rank"] == allowed


def test_a_rank_above_vllms_limit_is_refused(model: ModelSettings) -> None:
    with pytest.raises(XloomError, match="513") as raised:
        arguments(model, rank=513)
    assert raised.value.code == "rank_too_large"


def test_an_unsupported_architecture_names_those_supported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 32}'
    )
    with pytest.raises(XloomError, match=r"GPT2LMHeadModel.*LlamaForCausalLM") as raised:
        arguments(ModelSettings(source=str(tmp_path)), xlora=True)
    assert raised.value.code == "unsupported_architecture"


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(XloomError) as raised:
        arguments(ModelSettings(source=str(tmp_path / "none")))
    assert raised.value.code == "model_not_loadable"


def test_extra_args_pass_through_and_win(model: ModelSettings) -> None:
    made = arguments(model, max_num_seqs=7, extra_args={"max_num_batched_tokens": 64, "max_num_seqs": 9})
    assert (made["max_num_batched_tokens"], made["max_num_seqs"]) == (64, 9)
    assert made["trust_remote_code"] is False


def test_threads_are_split_between_ranks_unless_the_operator_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    bind_threads(2)
    import os

    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "3")
    bind_threads(2)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "3"
