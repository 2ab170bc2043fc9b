"""What undoes the gates is refused by name, in the arguments and in what vLLM resolves them to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xloom.protocol import XloomError
from xloom.vllm.engine.argument_table import ALLOWED, KNOWN, MERGED, READ, REFUSED, with_table
from xloom.vllm.engine.refusals import _RESOLVED, check_dtype, check_environment, check_resolved, merged

PAGE = Path(__file__).parents[4] / "docs" / "gpu.md"


def test_every_argument_of_vllm_is_classified_once() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert fields - KNOWN == set(), "new in this vLLM: look at each, and put it into argument_table.py"
    assert KNOWN - fields == set(), "gone from this vLLM"
    assert len(KNOWN) == len(REFUSED) + len(MERGED) + len(READ) + len(ALLOWED)


# A value of each refused argument that asks for what is refused.
ASKING: dict[str, Any] = {
    "model": "elsewhere",
    "revision": "main",
    "served_model_name": "other",
    "lora_target_modules": ["q_proj"],
    "default_mm_loras": {"image": "folder"},
    "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
    "worker_cls": "mine.Worker",
    "worker_extension_cls": "mine.Extension",
    "enable_lora": False,
    "enable_chunked_prefill": False,
    "max_num_active_seqs": 4,
    "pipeline_parallel_size": 2,
    "data_parallel_size": 2,
    "data_parallel_rank": 0,
    "data_parallel_start_rank": 0,
    "data_parallel_size_local": 2,
    "prefill_context_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "distributed_executor_backend": "external_launcher",
    "ubatch_size": 2,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    "spec_method": "ngram",
    "spec_model": "draft",
    "spec_tokens": 3,
    "diffusion_config": {"canvas_length": 32},
    "kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
    "kv_offloading_size": 1.0,
    "ec_transfer_config": {"ec_connector": "x"},
    "fault_tolerance_config": {"a": 1},
    "weight_transfer_config": {"backend": "nccl"},
    "aux_output_config": {"enable_return_routed_experts": True},
    "runner": "pooling",
    "convert": "embed",
    "pooler_config": {"pooling_type": "CLS"},
    "model_weights": "elsewhere",
    "hf_config_path": "elsewhere",
    "model_class_overrides": {"LlamaForCausalLM": "mine:Llama"},
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_refused_argument_is_named_with_its_cure(name: str) -> None:
    value = ASKING.get(name, True)
    with pytest.raises(XloomError) as raised:
        merged({}, {name: value}, mixtures=True)
    assert raised.value.code == "unsupported_setting"
    assert name in raised.value.message
    assert REFUSED[name].why in raised.value.message
    assert raised.value.cure
    if not REFUSED[name].always:
        assert merged({}, {name: value}, mixtures=False) == {name: value}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_argument_may_be_given_at_its_harmless_value(name: str) -> None:
    for value in REFUSED[name].harmless:
        assert merged({}, {name: value}, mixtures=True) == {name: value}
    assert merged({}, {name: None}, mixtures=True) == {name: None}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in MERGED.items() for part in parts])
def test_parts_of_mappings_are_refused_at_any_depth(name: str, part: str) -> None:
    value: Any = ["x"] if "arch" in part else {"a": 1} if part in ("xloom", "hisparse_config") else True
    for key in reversed(part.split(".")):
        value = {key: value}
    with pytest.raises(XloomError, match=part) as raised:
        merged({}, {name: value}, mixtures=True)
    assert raised.value.code == "unsupported_setting"


def test_a_merged_argument_must_be_a_mapping() -> None:
    with pytest.raises(XloomError, match="compilation_config") as raised:
        merged({}, {"compilation_config": "full"}, mixtures=False)
    assert raised.value.code == "unsupported_setting"


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("speculative-config", "speculative_config"),
        ("--enable-dbo", "enable_dbo"),
        ("compilation_config.cudagraph_mode", "compilation_config"),
        ("schedular_cls", "scheduler_cls"),
    ],
)
def test_other_spellings_are_not_passed_on(spelled: str, meant: str) -> None:
    with pytest.raises(XloomError, match=meant) as raised:
        merged({}, {spelled: True}, mixtures=False)
    assert raised.value.code == "unknown_engine_argument"


def resolved(**changed: Any) -> Any:
    """What of a resolved configuration is looked at, as it is where mixtures run; with some of it otherwise."""
    plain: dict[str, Any] = {"lora_config": SimpleNamespace(lora_dtype="auto"), "model_config": SimpleNamespace()}
    config = SimpleNamespace(**plain)
    for path, value in changed.items():
        *parents, last = path.split("__")
        holder = config
        for parent in parents:
            if getattr(holder, parent, None) is None:
                setattr(holder, parent, SimpleNamespace())
            holder = getattr(holder, parent)
        setattr(holder, last, value)
    return config


def test_what_is_on_in_the_result_is_refused_however_it_came_there() -> None:
    check_resolved(resolved())
    for path, name in _RESOLVED.items():
        wrong = ASKING.get(name, True)
        with pytest.raises(XloomError, match=name.rpartition(".")[2]) as raised:
            check_resolved(resolved(**{path.replace(".", "__"): wrong}))
        assert raised.value.code == "unsupported_setting"
    with pytest.raises(XloomError, match="enable_lora"):
        check_resolved(resolved(lora_config=None))


def test_the_environment_is_looked_at_where_no_configuration_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "0")
    check_environment()
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(XloomError, match="VLLM_LORA_ENABLE_DUAL_STREAM"):
        check_environment()


def test_float32_with_lora_is_refused_where_triton_runs() -> None:
    import torch

    wide = resolved(model_config__dtype=torch.float32)
    check_dtype(wide, "cpu")
    with pytest.raises(XloomError, match=r"engine\.dtype is float32"):
        check_dtype(wide, "cuda")
    adapters = resolved(model_config__dtype=torch.bfloat16, lora_config__lora_dtype=torch.float32)
    with pytest.raises(XloomError, match="lora_dtype is float32"):
        check_dtype(adapters, "cuda")
    check_dtype(resolved(model_config__dtype=torch.bfloat16, lora_config__lora_dtype=torch.bfloat16), "cuda")


def test_the_page_names_each_refused_argument() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run: python -m xloom.vllm.engine.argument_table docs/gpu.md"


@pytest.mark.parametrize("mixtures", [False, True])
def test_what_compiles_a_clients_grammar_without_a_limit_is_refused_without_mixtures_too(mixtures: bool) -> None:
    for library in ("outlines", "lm-format-enforcer"):
        with pytest.raises(XloomError) as caught:
            merged({}, {"structured_outputs_config": {"backend": library}}, mixtures=mixtures)
        assert caught.value.code == "unsupported_setting"
    wanted = {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True}}
    assert merged({}, wanted, mixtures=mixtures) == wanted
