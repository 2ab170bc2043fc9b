"""What an H100 is configured to do, by vLLM's own code: the default, and each refused way of undoing the gates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
PLUGIN = "xloom.vllm.plugin"


def extra(**arguments: Any) -> dict[str, Any]:
    return {"engine": {"extra_args": arguments}}


# What is asked, and what is said of it: by name what differs from the default, or the error's words.
KEPT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "without mixtures": (
        {"xlora": False},
        {"scheduler": None, "rows": 128, "additional": {}},
    ),
    "synchronous": (
        extra(async_scheduling=False),
        {"asynchronous": False, "scheduler": f"{PLUGIN}.scheduler.MixtureScheduler"},
    ),
    "the other runner": ({"environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}, {"v2": False}),
    "graph sizes of one's own": (
        extra(compilation_config={"cudagraph_capture_sizes": [1, 2, 4]}),
        {"graph_sizes": [1, 2, 4]},
    ),
    "piecewise graphs": (extra(compilation_config={"cudagraph_mode": "PIECEWISE"}), {"graphs": "PIECEWISE"}),
    "other rotary settings": (
        extra(hf_overrides={"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        {"rope_theta": 1e6},
    ),
    "a configuration for somebody else": (
        extra(additional_config={"theirs": 1}),
        {"additional": {"theirs": 1, "xloom": {"max_num_seqs": 128}}},
    ),
    "few sequences and a small budget": (
        {"engine": {"max_num_seqs": 64, "extra_args": {"max_num_batched_tokens": 64}}},
        {"rows": 64, "batched_tokens": 64, "graph_sizes": None, "additional": {"xloom": {"max_num_seqs": 64}}},
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another class": (extra(hf_overrides={"architectures": ["LlamaForCausalLM"]}), "hf_overrides.architectures"),
    "another scheduler": (extra(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"), "scheduler_cls"),
    "another worker": (extra(worker_extension_cls="a.B"), "worker_extension_cls"),
    "fused attention": (
        extra(compilation_config={"pass_config": {"fuse_attn_quant": True}}),
        "pass_config.fuse_attn_quant",
    ),
    "micro-batches": (extra(enable_dbo=True), "enable_dbo"),
    "speculation": (extra(speculative_config={"method": "ngram", "num_speculative_tokens": 2}), "speculative_config"),
    "a connector": (
        extra(kv_transfer_config={"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}),
        "kv_transfer_config",
    ),
    "offloaded pages": (extra(kv_offloading_size=1.0), "kv_offloading_size"),
    "sharded ranks": (extra(fully_sharded_loras=True), "fully_sharded_loras"),
    "a pipeline": (extra(pipeline_parallel_size=2), "pipeline_parallel_size"),
    "data parallelism": (extra(data_parallel_size=2), "data_parallel_size"),
    "sleep": (extra(enable_sleep_mode=True), "enable_sleep_mode"),
    "no LoRA": (extra(enable_lora=False), "enable_lora"),
    "wide numbers": ({"engine": {"dtype": "float32"}}, "float32"),
    "a stream of LoRA's own, from the environment": (
        {"environment": {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}},
        "VLLM_LORA_ENABLE_DUAL_STREAM",
    ),
    "too few pages": (
        {"engine": {"paged_attention": {"block_size": 32, "max_blocks": 32}}},
        "at least 33 pages",
    ),
}
MODELS = {"hybrid": "keeps a state", "recurrent": "keeps a state", "no LoRA": "takes no LoRA adapters"}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the program says of each try, by name; one start of it for all."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(folder / "mistral", "mistral", dtype=torch.bfloat16)
    wide = tiny_model(folder / "wide", "mistral")
    others = {
        "hybrid": ("jamba", "JambaForCausalLM"),
        "recurrent": ("mamba", "MambaForCausalLM"),
        "no LoRA": ("gpt2", "GPT2LMHeadModel"),
    }
    for name, (kind, architecture) in others.items():
        AutoConfig.for_model(kind, architectures=[architecture]).save_pretrained(folder / name)
    tries = {name: asked for name, (asked, _) in {**KEPT, **REFUSED}.items()}
    tries |= {f"model: {name}": {"model": str(folder / name)} for name in others}
    tries["a checkpoint in float32"] = {"model": str(wide)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.faked_gpu", str(model), json.dumps(list(tries.values()))],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(tries, lines, strict=True))


def test_an_h100_runs_as_vllm_serve_has_it_with_our_scheduler(said: dict[str, dict[str, Any]]) -> None:
    default = said["default"]
    assert default["v2"]
    assert default["graphs"] == "FULL_AND_PIECEWISE"
    assert default["asynchronous"]
    assert default["scheduler"] == f"{PLUGIN}.scheduler.AsyncMixtureScheduler"
    assert default["batched_tokens"] == 8192
    assert (default["rows"], default["additional"]) == (256, {"xloom": {"max_num_seqs": 128}})
    assert default["architectures"] == ["MistralForCausalLM"]
    # Base requests have the graphs that they have without mixtures.
    assert default["graph_sizes"] == said["without mixtures"]["graph_sizes"]


@pytest.mark.parametrize("name", KEPT)
def test_other_arguments_keep_working(said: dict[str, dict[str, Any]], name: str) -> None:
    different = KEPT[name][1]
    for key, value in {**said["default"], **different}.items():
        if value is not None or key not in different or key == "scheduler":
            assert said[name][key] == value, key


@pytest.mark.parametrize("name", REFUSED)
def test_what_undoes_the_gates_is_refused_by_name(said: dict[str, dict[str, Any]], name: str) -> None:
    assert said[name]["code"] in ("unsupported_setting", "too_few_pages"), said[name]
    assert REFUSED[name][1] in said[name]["message"]


@pytest.mark.parametrize("name", MODELS)
def test_models_without_a_scaling_sequence_are_refused_by_name(said: dict[str, dict[str, Any]], name: str) -> None:
    assert said[f"model: {name}"]["code"] == "unsupported_architecture", said[f"model: {name}"]
    assert MODELS[name] in said[f"model: {name}"]["message"]


def test_a_checkpoint_in_float32_runs_in_what_the_gpu_computes_in(said: dict[str, dict[str, Any]]) -> None:
    assert said["a checkpoint in float32"]["dtype"] == "torch.bfloat16"
