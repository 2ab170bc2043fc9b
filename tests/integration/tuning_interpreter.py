# ruff: noqa: E402 - the environment and the backend come before the imports that read them
"""Run as a program, `FOLDER`: the search of `xloom tune` on tiny shapes, its kernels in Triton's interpreter.

A clock of its own makes the narrowest blocks the fastest, and the kernel is wrong under the very fastest. Prints what
was found as JSON, and leaves the files in the folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace
from typing import Any

import triton.backends

# vllm.triton_utils.importing (0.32) uses Triton on a CPU build only when Triton names a CPU backend.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]

import torch

from xloom.commands.tune import plain
from xloom.protocol import XloomError
from xloom.vllm.engine import lora_timing
from xloom.vllm.engine.lora_configs import Config, lora_shapes, write_configs
from xloom.vllm.engine.lora_timing import FIXED, Case, Run, configs_of, search

MODEL = SimpleNamespace(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
WRONG, RIGHT = 16, 32  # block_m of the configurations tried


def few(case: Case) -> list[Config]:
    shared: Config = FIXED | {"block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 2}
    split: Config = {"split_k": 1} if case.operator == "shrink" else {}
    return [shared | split | {"block_m": WRONG}, shared | split | {"block_m": RIGHT}]


def clock(run: Run, sets: int) -> float:
    run(sets - 1)
    config = lora_timing._config.get()
    return float(config["block_m"] or 0) + (0 if config["block_k"] == 16 else 100)


def breaking(original: Any, out: int, factor: float, block_m: int | None) -> Any:
    def broken(*arguments: Any, **named: Any) -> None:
        original(*arguments, **named)
        if block_m is None or lora_timing._config.get()["block_m"] == block_m:
            arguments[out].mul_(factor)

    return broken


def main() -> None:
    shapes = lora_shapes(MODEL, 16)
    lora_timing.candidates = few
    shrink, expand = lora_timing.gated_shrink, lora_timing.lora_expand_op._lora_expand
    lora_timing.gated_shrink = breaking(shrink, 2, 1.1, WRONG)
    lora_timing.lora_expand_op._lora_expand = breaking(expand, 2, 1.1, WRONG)
    of: dict[str, Any] = {"device": "cpu", "dtype": torch.float16, "timer": clock, "rows": (4,), "workers": 1}
    found = search(shapes, 3, 300.0, **of)
    folder = write_configs(Path(sys.argv[1]), "Some GPU-1", shapes, configs_of(found, 3))
    hurried = search(shapes, 3, 0.0, **of)
    lora_timing.gated_shrink = breaking(shrink, 2, 1.1, None)
    try:
        search(shapes, 3, 0.0, **of)
        refused = ""
    except XloomError as error:
        refused = error.code
    result = {"folder": str(folder), "found": list(map(plain, found)), "hurried": list(map(plain, hurried))}
    print(json.dumps(result | {"refused": refused}))


if __name__ == "__main__":
    main()
