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


def test_cpu_memory_is_in_bytes_and_the_same_with_xlora(model: ModelSettings) -> None:
    plain = arguments(model, dtype="float32", paged_attention={"block_size": 32, "max_blocks": 10})
    # keys and values, 2 layers, 2 KV heads of 32, 4 bytes, 32 tokens a page, 10 pages
    assert plain["kv_cache_memory_bytes"] == 2 * 2 * 2 * 32 * 4 * 32 * 10
    pages = {"block_size": 32, "max_blocks": 10}
    both = arguments(model, dtype="float32", xlora=True, max_model_len=128, paged_attention=pages)
    assert both["kv_cache_memory_bytes"] == plain["kv_cache_memory_bytes"]


def test_gpu_takes_the_memory_fraction_and_pages_only_when_told(model: ModelSettings) -> None:
    made = arguments(model, device="cuda", paged_attention={"gpu_memory_fraction": 0.7})
    assert (made["gpu_memory_utilization"], made["block_size"], made["dtype"]) == (0.7, 16, "auto")
    assert not {"num_gpu_blocks_override", "kv_cache_memory_bytes"} & set(made)
    assert arguments(model, device="cuda", paged_attention={"max_blocks": 99})["num_gpu_blocks_override"] == 99


def test_xlora_leaves_model_class_and_graphs_alone_and_makes_rows_of_requests(model: ModelSettings) -> None:
    made = arguments(model, device="cuda", xlora=True, max_num_seqs=100)
    assert made["max_num_seqs"] == 200
    assert made["additional_config"] == {"xloom": {"max_num_seqs": 100}}
    assert "hf_overrides" not in made
    # Graphs of as many rows as without: what a step can have while pairs take turns.
    assert made["compilation_config"] == {"max_cudagraph_capture_size": 200}
    plain = arguments(model, device="cuda", max_num_seqs=100)
    assert plain["max_num_seqs"] == 100
    assert not {"additional_config", "compilation_config"} & set(plain)


def test_rows_stay_within_a_steps_tokens(model: ModelSettings) -> None:
    def rows(requests: int) -> int:
        made = arguments(model, xlora=True, max_num_seqs=requests, extra_args={"max_num_batched_tokens": 64})
        assert made["additional_config"]["xloom"]["max_num_seqs"] == requests
        return int(made["max_num_seqs"])

    assert [rows(requests) for requests in (16, 32, 48, 64)] == [32, 64, 64, 64]


def test_large_engines_keep_vllms_own_graph_sizes(model: ModelSettings) -> None:
    assert "compilation_config" not in arguments(model, device="cuda", xlora=True, max_num_seqs=512)
    sizes = {"cudagraph_capture_sizes": [1, 2, 4]}
    assert "compilation_config" not in arguments(model, device="cuda", xlora=True, extra_args=sizes)
    made = arguments(model, device="cuda", xlora=True, extra_args={"compilation_config": sizes})
    assert made["compilation_config"] == sizes


def test_the_users_mappings_are_merged_into_ours(model: ModelSettings) -> None:
    theirs = {
        "compilation_config": {"pass_config": {"eliminate_noops": False}},
        "hf_overrides": {"rope_theta": 1e6},
        "additional_config": {"theirs": {"a": 1}},
        "max_num_seqs": 9,
    }
    made = arguments(model, device="cuda", xlora=True, extra_args=theirs)
    assert made["compilation_config"] == {
        "max_cudagraph_capture_size": 18, "pass_config": {"eliminate_noops": False}
    }  # fmt: skip
    assert made["hf_overrides"] == {"rope_theta": 1e6}
    assert made["additional_config"] == {"theirs": {"a": 1}, "xloom": {"max_num_seqs": 9}}
    assert made["max_num_seqs"] == 18


def test_a_pool_without_room_for_a_pair_is_refused_before_anything_loads(model: ModelSettings) -> None:
    def pool(pages: int, *, xlora: bool = True) -> dict[str, Any]:
        sizes = {"block_size": 32, "max_blocks": pages}
        return arguments(model, xlora=xlora, max_model_len=512, paged_attention=sizes)

    with pytest.raises(XloomError, match="at least 33 pages") as raised:
        pool(32)
    assert raised.value.code == "too_few_pages"
    assert pool(33)["num_gpu_blocks_override"] == 33
    assert pool(17, xlora=False)["num_gpu_blocks_override"] == 17


@pytest.mark.parametrize("dtype", [{"dtype": "float32"}, {"extra_args": {"dtype": "float"}}])
def test_float32_is_refused_on_a_gpu_by_name(model: ModelSettings, dtype: dict[str, Any]) -> None:
    with pytest.raises(XloomError, match=r"float32.*LoRA") as raised:
        arguments(model, device="cuda", **dtype)
    assert raised.value.code == "unsupported_setting"


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (5, 8), (36, 64), (300, 320)])
def test_ranks_are_padded_to_what_vllm_allows(model: ModelSettings, rank: int, allowed: int) -> None:
    assert arguments(model, rank=rank)["max_lora_rank"] == allowed


def test_a_rank_above_vllms_limit_is_refused(model: ModelSettings) -> None:
    with pytest.raises(XloomError, match="513") as raised:
        arguments(model, rank=513)
    assert raised.value.code == "rank_too_large"


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
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    bind_threads(2)
    import os

    assert os.environ["GOMP_SPINCOUNT"] == "1000"  # they wait without holding up what else runs there

    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "3")
    bind_threads(2)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "3"
