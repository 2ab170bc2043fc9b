"""Run as a program: one mixture on each of the architectures named, in engines in this process, against PEFT.

Prints a line of JSON for each. What an engine is started with comes from `engine_config`, as in a replica.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors.torch import load_file, save_file

from tests.models import HIDDEN, adapters_for, load_model, peft_greedy, peft_logits, peft_xlora, tiny_bundle, tiny_model
from xloom.mixtures.modules import linear_modules
from xloom.mixtures.prepare import prepare_bundle
from xloom.settings import EngineSettings, ModelSettings
from xloom.vllm.engine.arguments import engine_config

PROMPTS = (list(range(40, 75)), [7, 9, 30, 31, 32, 33, 5, 8, 21, 22, 23, 24])
NEW_TOKENS = 8
TIED = ("gemma", "gemma2", "gemma3", "cohere")  # vLLM has no head of their own for these


def served(architecture: str, folder: Path) -> dict[str, Any]:
    """How the engine's answers compare with PEFT's: the mixture's and the base model's, together in one batch."""
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    model = tiny_model(folder / "model", architecture, tied=architecture in TIED)
    bundle = tiny_bundle(folder / "bundle", model, adapters=adapters_for(architecture), seed=3, depth=2, top_k=2)
    prepare_bundle(
        bundle, linear_modules(str(model)), folder / "blend", hidden_size=HIDDEN, max_rank=256,
    )  # fmt: skip
    oracle = asked(model, bundle)  # before vLLM, whose Transformers backend changes the models' classes
    settings = EngineSettings(
        max_model_len=256, max_num_seqs=4, dtype="float32", compile=False,
        extra_args={"skip_tokenizer_init": True, "max_num_batched_tokens": 64, "distributed_executor_backend": "uni"},
    )  # fmt: skip
    config = engine_config(ModelSettings(source=str(model)), settings, xlora=True, max_lora_rank=32)
    engine = LLMEngine(config, Executor.get_class(config), log_stats=False)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=4)
    lora = LoRARequest("blend@1", 77, str(folder / "blend"))
    for number, prompt in enumerate(PROMPTS):
        for kind, request in (("mixture", lora), ("base", None)):
            engine.add_request(f"{kind}-{number}", {"prompt_token_ids": prompt}, sampling, lora_request=request)
    answers = {}
    while engine.has_unfinished_requests():
        answers |= {each.request_id: each.outputs[0] for each in engine.step() if each.finished}
    # As the backend asks: before an adapter is loaded, and afterwards.
    for loaded in (None, 77):
        assert engine.collective_rpc("xloom_unapplied", args=(str(folder / "blend"), loaded)) == [[]]
    report: dict[str, Any] = {}
    for name, (tokens, wanted, plain) in oracle.items():
        answer = answers[name]
        pairs = [
            (each.logprob, wanted[place, token].item())
            for place, candidates in enumerate(answer.logprobs)
            for token, each in candidates.items()
        ]
        report[name] = {
            "equal": list(answer.token_ids) == tokens,
            "apart": max(abs(got - meant) for got, meant in pairs),
            "effect": (wanted - plain).abs().max().item(),
        }
    runs = config.model_config.registry.resolve_model_cls(config.model_config.architectures, config.model_config)
    refusals = refused(config, model, folder / "damaged")
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"architecture": architecture, "class": runs[0].__name__, "answers": report, "refused": refusals}


def refused(config: Any, model: Path, damaged: Path) -> dict[str, str]:
    """What vLLM says of the checkpoint without one of its tensors, by the tensor: a linear, another, and a norm."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    weights = load_file(model / "model.safetensors")
    names = sorted(name for name in weights if ".1." in name and name.endswith(".weight"))
    chosen = [
        next(name for name in names if "k_proj" in name or "qkv" in name or "query_key_value" in name),
        next(name for name in names if "down_proj" in name or "fc2" in name or "4h_to_h" in name or "c_proj" in name),
        next(name for name in names if "norm" in name or "ln_" in name),
    ]
    shutil.copytree(model, damaged)
    config.model_config.model = str(damaged)
    said = {}
    for name in chosen:
        save_file({each: tensor for each, tensor in weights.items() if each != name}, damaged / "model.safetensors")
        config.compilation_config.static_forward_context.clear()
        try:
            with set_current_vllm_config(config):
                get_model(vllm_config=config)
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    return said


def asked(model: Path, bundle: Path) -> dict[str, tuple[list[int], torch.Tensor, torch.Tensor]]:
    """By request: PEFT's tokens, their log-probabilities `[NEW_TOKENS, vocabulary]`, and the base model's there."""
    base = load_model(model)
    found = {}
    for kind, oracle in {"base": base, "mixture": peft_xlora(model, bundle)}.items():
        for number, prompt in enumerate(PROMPTS):
            tokens = peft_greedy(oracle, prompt, NEW_TOKENS)
            both = [peft_logits(each, prompt + tokens)[len(prompt) - 1 : -1].log_softmax(-1) for each in (oracle, base)]
            found[f"{kind}-{number}"] = (tokens, both[0], both[1])
    return found


def main() -> None:
    torch.set_num_threads(1)
    for architecture in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(served(architecture, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads have nothing to say any more
