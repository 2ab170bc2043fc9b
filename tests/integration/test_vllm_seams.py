"""What the plugin and the backend rely on of vLLM 0.32: this fails when an upgrade takes it away."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import vllm
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.triton_ops import lora_shrink_op
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.utils import torch_utils
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

from xloom.vllm.plugin import GATES, activate
from xloom.vllm.plugin.scheduler import AsyncMixtureScheduler, PairScheduling
from xloom.vllm.plugin.worker import MixtureWorker


def test_version_is_the_one_the_seams_were_read_in() -> None:
    assert vllm.__version__.startswith("0.32.")


def test_a_vllm_that_xloom_did_not_start_is_untouched() -> None:
    # As a user's own engine has it, with xloom in the same environment.
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "import sys; from vllm.platforms import current_platform\n"
        "print(current_platform.get_punica_wrapper(), any(name.startswith('xloom') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    wrapper, ours = done.stdout.strip().splitlines()[-1].split()
    assert wrapper == "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    assert ours == "False"


def test_the_loader_reads_and_fills_where_the_ledger_looks() -> None:
    activate()
    load = DefaultModelLoader.load_weights
    source = inspect.getsource(inspect.unwrap(load))
    assert inspect.unwrap(load) is not load
    assert "loaded_weights = model.load_weights(self.get_all_weights(model_config, model))" in source
    assert "self.load_weights(model, model_config)" in inspect.getsource(BaseModelLoader.load_model)


def test_activated_it_names_our_wrapper() -> None:
    activate()
    assert current_platform.get_punica_wrapper() == "xloom.vllm.plugin.punica_cpu.GatedPunicaCPU"


def test_the_scheduler_asks_where_pairs_answer() -> None:
    for name, method in vars(PairScheduling).items():
        if not inspect.isfunction(method) or name.startswith("__") or hasattr(Scheduler, name):
            continue
        assert name in OUR_OWN, f"{name} overrides nothing of vLLM's scheduler any more"
    schedule = inspect.getsource(Scheduler.schedule)
    running, waiting = schedule.split("# Next, schedule the WAITING requests.")
    for part in (running, waiting):  # the last word on a request's number of tokens, in both
        assert "num_new_tokens = self._reserve_prefill_lookahead(" in part
    assert "request_queue = self.kv_holding_waiting" in waiting
    assert "if num_running >= self.max_num_active_reqs:" in waiting
    assert "self._handle_blocked_waiting_request(request)" in waiting
    assert "self._get_local_prefix_cache_hit(request)" in waiting
    assert "self.record_prefix_cache_stats" not in schedule
    assert "self.kv_cache_manager.record_prefix_cache_stats(" in schedule
    assert "preempted_req_ids=self.reset_preempted_req_ids" in schedule
    assert AsyncMixtureScheduler.__mro__[1] is PairScheduling


OUR_OWN = {
    "_withdraw", "_look_at_admitted", "_seat_beside", "_wake_parked", "_youngest_running", "_lacking_pages",
    "_free_pages", "_loras_in_use", "_has_room", "_preempt_pair", "_finish_preemptions", "_end_scaling", "_scale_again",
}  # fmt: skip


def test_requests_and_pages_are_as_pairs_take_them() -> None:
    source = inspect.getsource(Request.__init__)
    for name in ("_all_token_ids", "_output_token_ids", "num_output_placeholders", "num_stale_output_tokens",
                 "num_computed_tokens", "skip_reading_prefix_cache", "_block_hasher"):  # fmt: skip
        assert f"self.{name}" in source
    assert inspect.signature(KVCacheManager.truncate_computed_blocks).parameters.keys() == {
        "self", "blocks", "num_computed_tokens"
    }  # fmt: skip
    assert {"apply_admission_cap", "prefill_end", "num_tokens_main_model"} <= set(
        inspect.signature(KVCacheCoordinator.get_num_blocks_to_allocate).parameters
    )


def test_the_v1_runner_drops_what_is_sampled_for_a_request_with_more_tokens() -> None:
    source = inspect.getsource(GPUModelRunner._prepare_inputs)
    assert "num_tokens = [self.requests[r].num_tokens for r in self.input_batch.req_ids]" in source
    assert "self.discard_request_mask.np[:num_reqs]" in source
    update = list(inspect.signature(GPUModelRunner._update_states).parameters)
    assert update == ["self", "scheduler_output"]
    assert "model_output = self._model_forward(" in inspect.getsource(GPUModelRunner.execute_model)
    assert list(inspect.signature(LoRAModelRunnerMixin.load_lora_model).parameters)[:3] == [
        "self", "model", "vllm_config"
    ]  # fmt: skip


def test_a_worker_method_of_ours_is_reached_through_the_engine_core() -> None:
    load = inspect.getsource(WorkerWrapperBase.init_worker)
    assert "parallel_config.worker_extension_cls" in load
    called = list(inspect.signature(AsyncMPClient.collective_rpc_async).parameters)
    assert called == ["self", "method", "timeout", "args", "kwargs"]
    for method in vars(MixtureWorker):
        assert method.startswith("__") or not hasattr(WorkerBase, method)


def test_gates_go_with_a_steps_output_to_the_client() -> None:
    assert "kv_transfer_params" in EngineCoreOutput.__struct_fields__
    assert inspect.signature(AsyncModelRunnerOutput.get_output).parameters.keys() == {"self"}
    output = ModelRunnerOutput([], {})
    vars(output)[GATES] = {}
    assert getattr(pickle.loads(pickle.dumps(output)), GATES) == {}  # as it comes from a worker of several
    assert "output = output.get_output()" in inspect.getsource(WorkerProc.enqueue_output)
    assert list(inspect.signature(GPUModelRunner.sample_tokens).parameters) == ["self", "grammar_output"]
    second = (Path(vllm.__file__).parent / "v1/worker/gpu/model_runner.py").read_text(encoding="utf-8")
    assert "def sample_tokens(\n        self, grammar_output: GrammarOutput | None\n" in second


def test_lora_seams_keep_their_signatures() -> None:
    linear = list(inspect.signature(PunicaWrapperBase.add_lora_linear).parameters)
    assert linear[:7] == ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]
    for wrapper in (PunicaWrapperBase, PunicaWrapperCPU, PunicaWrapperGPU):
        metadata = list(inspect.signature(wrapper.update_metadata).parameters)
        assert metadata[:5] == ["self", "mapping", "lora_index_to_id", "max_loras", "vocab_size"]
    shrink = list(inspect.signature(PunicaWrapperGPU.add_shrink).parameters)
    assert shrink[:5] == ["self", "y", "x", "lora_a_stacked", "scale"]
    assert list(inspect.signature(WorkerLoRAManager._load_adapter).parameters) == ["self", "lora_request"]
    source = inspect.getsource(LoRAModelManager.__init__)
    for name in ("_registered_adapters", "lora_index_to_id", "packed_modules", "modules"):
        assert f"self.{name}" in source
    assert "self.punica_wrapper_mapping" in inspect.getsource(LoRAModelManager._init_punica_wrapper)


def test_what_the_gated_shrink_follows_is_as_it_was_read() -> None:
    taken = list(inspect.signature(lora_shrink_op._lora_shrink).parameters)
    given = re.findall(
        r"^            (?:self\.)?(\w+)(?:\[:token_nums\])?,$", inspect.getsource(LoRAKernelMeta.meta_args), re.M
    )
    names = ["token_lora_mapping", "token_indices_sorted_by_lora_ids", "num_tokens_per_lora", "lora_token_start_loc"]
    assert taken[3:] == [*names, "lora_ids", "no_lora_flag_cpu", "num_active_loras", "scaling"]
    assert given == [*names, "active_lora_ids", "no_lora_flag_cpu", "num_active_loras"]
    source = inspect.getsource(lora_shrink_op._lora_shrink)
    for part in ("if no_lora_flag_cpu.item():", "output_tensor.zero_()", 'kernel_config.get("group_size_m", 8)'):
        assert part in source
    assert "t.to(device=device, dtype=dtype, non_blocking=True)" in inspect.getsource(torch_utils.async_tensor_h2d)
