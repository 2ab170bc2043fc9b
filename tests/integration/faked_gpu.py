# ruff: noqa: E402 - the stand-ins come before the imports that read them
"""Run as a program: what settings resolve to on an H100, by vLLM's own CUDA platform on a machine without one.

Reads a model's folder and a JSON list of `{"engine": ..., "xlora": ..., "environment": ...}` from the command line, and
prints a JSON line for each: the error's code and message, or what the configuration says. A process of its own, since
vLLM decides on its platform once.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")
for name in ("vllm._C_stable_libtorch", "vllm._C"):  # objects of the CUDA build
    sys.modules[name] = types.ModuleType(name)

import torch

# Relied on: which of these operators vllm.platforms.cuda and the quantisation code ask (0.32); a CUDA build has them.
library = torch.library.Library("_C", "FRAGMENT")
for kind in ("block_fp8", "fp8", "fp4", "mxfp8"):
    library.define(f"cutlass_scaled_mm_supports_{kind}(int cap) -> bool")
    library.impl(f"cutlass_scaled_mm_supports_{kind}", lambda cap: True, "CompositeImplicitAutograd")

import vllm.config.vllm as config_module
import vllm.platforms as platforms
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability


class H100(CudaPlatformBase):
    """A platform that answers as an H100 would."""

    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    has_device_capability = classmethod(
        lambda cls, capability, device_id=0: (
            (capability if isinstance(capability, int) else capability[0] * 10 + capability[1]) <= 90
        )
    )
    get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
    get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
    device_count = classmethod(lambda cls: 1)
    is_fully_connected = classmethod(lambda cls, ids: True)
    num_compute_units = classmethod(lambda cls, device_id=0: 132)


def main(model: str, tries: list[dict[str, Any]]) -> None:
    inspect({model, *(each["model"] for each in tries if "model" in each)})
    platforms._current_platform, config_module.HAS_TRITON = H100(), True

    from xloom.protocol import XloomError
    from xloom.settings import EngineSettings, ModelSettings
    from xloom.vllm.engine.arguments import engine_config

    for each in tries:
        before = dict(os.environ)
        os.environ.update(each.get("environment", {}))
        engine = {"max_model_len": 512, **each.get("engine", {})}
        engine["extra_args"] = {"skip_tokenizer_init": True, **engine.get("extra_args", {})}
        try:
            settings = EngineSettings(**engine)
            made = engine_config(
                ModelSettings(source=each.get("model", model)),
                settings,
                xlora=each.get("xlora", True),
                max_lora_rank=64,
            )
        except XloomError as error:
            said = {"code": error.code, "message": f"{error.message} {error.cure}"}
        else:
            said = told(made)
        print(json.dumps(said), flush=True)
        os.environ.clear()
        os.environ.update(before)


def inspect(folders: set[str]) -> None:
    """Import the models' classes while the platform is the CPU's: on CUDA they want objects of that build."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _ModelInfo, _ModelRegistry

    from xloom.vllm.plugin import activate

    found = {}
    for folder in folders:
        for architecture in json.loads((Path(folder) / "config.json").read_text())["architectures"]:
            if architecture in ModelRegistry.models:
                found[architecture] = _ModelInfo.from_model_cls(ModelRegistry.models[architecture].load_model_cls())
    activate()  # it imports the model runners
    _ModelRegistry._try_inspect_model_cls = lambda self, architecture: found.get(architecture)


def told(made: Any) -> dict[str, Any]:
    scheduler, compilation = made.scheduler_config, made.compilation_config
    return {
        "v2": made.use_v2_model_runner,
        "graphs": compilation.cudagraph_mode.name,
        "graph_sizes": compilation.cudagraph_capture_sizes,
        "asynchronous": scheduler.async_scheduling,
        "scheduler": scheduler.scheduler_cls,
        "rows": scheduler.max_num_seqs,
        "batched_tokens": scheduler.max_num_batched_tokens,
        "additional": made.additional_config,
        "extension": made.parallel_config.worker_extension_cls,
        "architectures": made.model_config.architectures,
        "dtype": str(made.model_config.dtype),
        "rope_theta": made.model_config.hf_text_config.rope_parameters["rope_theta"],
    }


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
