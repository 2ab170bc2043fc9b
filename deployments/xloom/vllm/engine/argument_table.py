"""Every engine argument of vLLM 0.32, classified: what X-LoRA mixtures allow, merge with their own, or refuse.

Plain data. A test holds that each field of vLLM's `AsyncEngineArgs` is here once, so that an upgrade of vLLM fails
until its new arguments have been looked at. `python -m xloom.vllm.engine.argument_table docs/gpu.md` writes the
refused ones into that page.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- refused arguments -->", "<!-- end of refused arguments -->"


@dataclass(frozen=True)
class Refusal:
    """Why an argument is refused, unless its value is None or one of `harmless`."""

    why: str
    harmless: tuple[Any, ...] = (False,)
    cure: str = ""  # instead of "Leave it out"
    always: bool = False  # not with mixtures alone

    def refuses(self, value: Any) -> bool:
        """Whether this value is refused."""
        return value is not None and value not in self.harmless


_PARALLEL = "gates are made on one set of tensor-parallel ranks, which holds all layers and all requests"
_MICRO = "a step is split in two, each half with rows of its own, while gates are those of the whole step"
_SPECULATIVE = "drafted tokens would be computed with gates of tokens that are not theirs"
_TRANSFER = "keys and values that come from elsewhere come without the hidden states that gates are made of"
_OURS = "it is xloom's own, without which mixtures are served ungated"
_EXPERTS = "LoRA on experts has no gate"
_TEXT = "a scaling sequence is made of tokens; other inputs would be missing from it"
_GENERATE = "mixtures generate text"
_MODEL = "it names another model than the one adapters are held against"
_COUNT = "it counts rows, of which a mixture's request takes two"

REFUSED: Mapping[str, Refusal] = {
    "trust_remote_code": Refusal("code from a model's repository is never run", always=True),
    "model": Refusal(_MODEL, cure="Set model.source.", always=True),
    "revision": Refusal(_MODEL, cure="Set model.revision.", always=True),
    "served_model_name": Refusal("the router has the names", cure="Set model.served_name.", always=True),
    "lora_target_modules": Refusal("what adapters change in other modules would be left out in silence", always=True),
    "default_mm_loras": Refusal("adapters come from the store alone", always=True, harmless=({},)),
    "scheduler_cls": Refusal(_OURS),
    "worker_cls": Refusal(_OURS, harmless=("auto",)),
    "worker_extension_cls": Refusal("it is xloom's own, which readies vLLM's workers for adapters", always=True),
    "enable_lora": Refusal("a mixture is a LoRA slot", harmless=(True,)),
    "max_num_active_seqs": Refusal(_COUNT, cure="Set engine.max_num_seqs."),
    "enable_chunked_prefill": Refusal(
        "a mixture's prompt is computed in parts, behind its scaling sequence", harmless=(True,)
    ),
    "fully_sharded_loras": Refusal("the ranks that gates multiply would be split over devices"),
    "pipeline_parallel_size": Refusal(_PARALLEL, harmless=(1,)),
    "data_parallel_size": Refusal(_PARALLEL, harmless=(1,), cure="Set replicas.min and replicas.max."),
    "data_parallel_rank": Refusal(_PARALLEL, harmless=()),
    "data_parallel_start_rank": Refusal(_PARALLEL, harmless=()),
    "data_parallel_size_local": Refusal(_PARALLEL, harmless=(1,)),
    "data_parallel_hybrid_lb": Refusal(_PARALLEL),
    "data_parallel_external_lb": Refusal(_PARALLEL),
    "data_parallel_multi_port_external_lb": Refusal(_PARALLEL),
    "enable_elastic_ep": Refusal("ranks come and go with gates on them"),
    "enable_fault_tolerance": Refusal("it needs data parallelism, which mixtures have not"),
    "fault_tolerance_config": Refusal("it needs data parallelism, which mixtures have not", harmless=({},)),
    "prefill_context_parallel_size": Refusal("the tokens of a row would be split over devices", harmless=(1,)),
    "decode_context_parallel_size": Refusal("the pages of a row would be split over devices", harmless=(1,)),
    "distributed_executor_backend": Refusal(
        "its ranks may not be those of xloom's worker", harmless=("mp", "uni", "ray")
    ),
    "enable_hc_sp": Refusal("the tokens of a step would be split over devices"),
    "enable_batch_sharded_sampling": Refusal(
        "a scaling sequence's next token is its request's, of another rank's share"
    ),
    "enable_dbo": Refusal(_MICRO),
    "ubatch_size": Refusal(_MICRO, harmless=(0, 1)),
    "speculative_config": Refusal(_SPECULATIVE, harmless=({},)),
    "spec_method": Refusal(_SPECULATIVE),
    "spec_model": Refusal(_SPECULATIVE),
    "spec_tokens": Refusal(_SPECULATIVE, harmless=(0,)),
    "diffusion_config": Refusal("tokens are not computed once each, in order", harmless=({},)),
    "kv_transfer_config": Refusal(_TRANSFER, harmless=({},)),
    "kv_offloading_size": Refusal(_TRANSFER),
    "ec_transfer_config": Refusal(_TRANSFER, harmless=({},)),
    "kv_sharing_fast_prefill": Refusal("layers skip tokens of the prompt, whose hidden states gates are made of"),
    "enable_sleep_mode": Refusal("its second level drops weights and, with them, adapters and routers"),
    "weight_transfer_config": Refusal("weights would change under gates made with the old ones", harmless=({},)),
    "enable_return_routed_experts": Refusal("experts of the scaling sequence would be taken for the request's"),
    "aux_output_config": Refusal("experts of the scaling sequence would be taken for the request's", harmless=({},)),
    "enable_prompt_embeds": Refusal(_TEXT),
    "enable_mm_embeds": Refusal(_TEXT),
    "mm_encoder_only": Refusal(_GENERATE),
    "runner": Refusal(_GENERATE, harmless=("auto", "generate")),
    "convert": Refusal(_GENERATE, harmless=("auto", "none")),
    "pooler_config": Refusal(_GENERATE, harmless=({},)),
    "model_weights": Refusal(_MODEL, harmless=("",), cure="Set model.source."),
    "hf_config_path": Refusal(_MODEL, cure="Set model.source."),
    "model_class_overrides": Refusal("the model's class would be another", harmless=({},)),
    "enable_tower_connector_lora": Refusal(_TEXT),
    "enable_mixed_moe_lora_format": Refusal(_EXPERTS),
    "enable_moe_shared_loras": Refusal(_EXPERTS),
}

# What is the user's is merged into what is xloom's; of these, the parts named are refused (a dot between levels).
MERGED: Mapping[str, Mapping[str, Refusal]] = {
    "hf_overrides": {
        "architectures": Refusal("the model's class would be another"),
        "model_type": Refusal("the model's class would be another"),
        "text_config.architectures": Refusal("the model's class would be another"),
        "text_config.model_type": Refusal("the model's class would be another"),
    },
    "additional_config": {"xloom": Refusal(_OURS)},
    "compilation_config": {
        "pass_config.fuse_attn_quant": Refusal("attention would hand on quantised values, which LoRA multiplies too"),
    },
    "structured_outputs_config": {
        "backend": Refusal(
            "it compiles what a client sends without a limit in time or memory",
            harmless=("auto", "xgrammar", "guidance"),
            cure="Set it to xgrammar or guidance.",
            always=True,
        ),
    },
    "attention_config": {"hisparse_config": Refusal("pages lie in a second pool, which pairs are not admitted by")},
}

# A value of one's own that xloom reads too: it makes rows of requests, and reckons pages.
READ = frozenset({"max_num_seqs", "dtype", "max_model_len", "max_lora_rank"})

# Named one by one, each looked at: they change neither which rows are computed when, nor what multiplies them.
ALLOWED = frozenset(
    (
        # the model's files, numbers and tokenizer
        "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init hf_token config_format download_dir "
        "load_format safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size "
        "model_loader_extra_config ignore_patterns use_tqdm_on_load pt_load_map_location model_impl quantization "
        "quantization_config allow_deprecated_quantization seed generation_config override_generation_config "
        "disable_sliding_window disable_cascade_attn allowed_local_media_path allowed_media_domains "
        # pages
        "block_size kv_cache_dtype kv_cache_dtype_skip_layers enable_prefix_caching prefix_caching_hash_algo "
        "prefix_cache_retention_interval prefix_match_unit swa_bounded_replay gpu_memory_utilization "
        "kv_cache_memory_bytes num_gpu_blocks_override disable_hybrid_kv_cache_manager kv_cache_metrics "
        "kv_cache_metrics_sample kv_events_config kv_offloading_backend "
        # scheduling
        "max_num_batched_tokens max_num_scheduled_tokens long_prefill_token_threshold "
        "long_prefill_token_threshold_adaptive max_num_queued_reqs max_num_queued_tokens scheduling_policy "
        "scheduler_reserve_full_isl prefill_schedule_interval watermark async_scheduling stream_interval "
        "disable_chunked_mm_input "
        # adapters
        "max_loras max_cpu_loras lora_dtype specialize_active_lora max_lora_cls_labels "
        # graphs, kernels, compilation
        "enforce_eager cudagraph_capture_sizes max_cudagraph_capture_size ir_op_priority attention_backend "
        "kernel_config moe_backend linear_backend sparse_indexer_topk_backend enable_flashinfer_autotune "
        "optimization_level performance_mode gdn_prefill_backend kda_prefill_backend kda_decode_backend "
        "jit_monitor_mode jit_monitor_verbose "
        # devices, and ranks of one engine
        "tensor_parallel_size enable_expert_parallel enable_ep_weight_filter enable_eplb eplb_config "
        "expert_placement_strategy all2all_backend disable_custom_all_reduce "
        "enable_shm_tensor_arena max_parallel_loading_workers device_ids numa_bind numa_bind_nodes numa_bind_cpus "
        "nnodes node_rank master_addr master_port distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "ray_workers_use_nsight cpu_offload_gb cpu_offload_params offload_backend offload_group_size "
        "offload_num_in_group offload_prefetch_step offload_params enable_cumem_allocator enable_nccl_comm_suspend "
        # sampling and what comes out
        "max_logprobs logprobs_mode use_fp64_gumbel return_sampling_mask enable_trace_replay logits_processors "
        "reasoning_parser reasoning_parser_plugin reasoning_config watermark_config "
        # logs and figures
        "disable_log_stats aggregate_engine_logging show_hidden_metrics_for_version otlp_traces_endpoint "
        "collect_detailed_traces per_request_spec_decode_metrics custom_histogram_buckets cudagraph_metrics "
        "enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details profiler_config "
        "logging_config log_level log_config_file enable_log_requests shutdown_timeout fail_on_environ_validation "
        # without effect: of kinds of models or of parallelism that are refused, and of vLLM's own front end
        "data_parallel_address data_parallel_rpc_port data_parallel_backend dp_sync_interval elastic_ep_max_dp_size "
        "disable_nccl_for_dp_synchronization dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend "
        "dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size sleep_mode_offload_cudagraph "
        "sleep_preserve_parameter_names mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size "
        "mamba_cache_mode mamba_backend mamba_ssu_algorithm enable_mamba_shared_prefix_checkpoint "
        "enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds replayssm_buffer_len use_replayssm "
        "code_revision engram_config ec_manager_config language_model_only limit_mm_per_prompt "
        "interleave_mm_strings media_io_kwargs "
        "mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm "
        "mm_shm_cache_max_object_size_mb mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype "
        "mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin io_processor_plugin "
        "renderer_num_workers skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc "
        "mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize enable_mm_processor_stats tokens_only "
        "_api_process_count _api_process_rank"
    ).split()
)

KNOWN = frozenset(REFUSED) | frozenset(MERGED) | READ | ALLOWED


def markdown() -> str:
    """The refused arguments as a table, those of one reason in one row."""
    reasons: dict[str, list[str]] = {}
    parts = {f"{name}.{part}": refusal for name, known in MERGED.items() for part, refusal in known.items()}
    for name, refusal in {**REFUSED, **parts}.items():
        why = refusal.why + (" (refused without mixtures too)" if refusal.always else "")
        harmless = [value for value in refusal.harmless if value not in ({}, "", 0, False)]
        but = f" (but for `{'`, `'.join(map(str, harmless))}`)" if harmless else ""
        reasons.setdefault(why, []).append(f"`{name}`{but}")
    lines = ["| refused | why |", "|---|---|", *(f"| {', '.join(names)} | {why} |" for why, names in reasons.items())]
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the table between its marks as the code has it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
