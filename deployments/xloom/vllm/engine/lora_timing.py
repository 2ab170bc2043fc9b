"""Times the LoRA kernels under many configurations on this machine's GPU, and checks what each computes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

# Relied on: `_lora_expand` and `gated_shrink` look their configuration up by these names; `utils._LORA_A_PTR_DICT`
# and `_LORA_B_PTR_DICT`; vLLM 0.32.
from vllm.lora.ops.triton_ops import lora_expand_op, utils
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

from xloom.protocol import XloomError
from xloom.vllm.engine.lora_configs import Config, LoRAShapes, Shape
from xloom.vllm.plugin.gate_tables import GateTables
from xloom.vllm.plugin.gated_shrink import gated_shrink

ROWS = (8, 32, 64, 256, 2048)  # of a batch: decoding of few and many, a chunk of prompts
PREFILL = 512  # from so many rows on, other configurations are worth a try
TOLERANCE = 0.02  # of the result's norm: bfloat16's rounding, and sums in another order
MOVED = 128 << 20  # bytes of weights read in turn, so that a cache does not hold them from one run to the next
FIXED: Config = {"num_ctas": 1, "group_size_m": 8, "max_nreg": None}

_config: ContextVar[Config] = ContextVar("config")
_vllms_choice = utils.get_lora_op_configs.__wrapped__  # past its cache


@dataclass(frozen=True)
class Case:
    """One kernel's launch: `operator` is shrink or expand."""

    operator: str
    shape: Shape
    rows: int


@dataclass(frozen=True)
class Best:
    """The fastest configuration of a case, and vLLM's default beside it: microseconds a launch."""

    case: Case
    config: Config
    us: float
    default_us: float


Run = Callable[[int], None]  # launches the kernel on one of several sets of weights
Timer = Callable[[Run, int], float]  # microseconds a launch, of so many sets in turn


def cases(shapes: LoRAShapes, rows: tuple[int, ...] = ROWS) -> list[Case]:
    """All that vLLM will look up, the smallest batches last: prefill gains most."""
    return [
        Case(operator, shape, count)
        for count in sorted(rows, reverse=True)
        for operator in ("shrink", "expand")
        for shape in shapes.of(operator)
    ]


def candidates(case: Case) -> list[Config]:
    """Configurations worth a try: those first that differ least from what was best elsewhere."""
    shape, found = case.shape, []
    if case.operator == "shrink":
        if case.rows < PREFILL:
            grid = _nearest_first((16,), (32, 64, 16), (128, 256), (32, 16, 8), (4,), (2, 4))
        else:
            grid = _nearest_first((64, 128), (64, 32), (128, 64), (4, 2, 1), (4, 8), (3, 2))
        for m, n, k, split, warps, stages in grid:
            if n <= max(16, shape.n) and k * split <= shape.k:
                blocks: Config = {"block_m": m, "block_n": n, "block_k": k, "split_k": split}
                found.append(FIXED | blocks | {"num_warps": warps, "num_stages": stages})
        return found
    sums = tuple(size for size in (64, 32, 16) if size <= max(16, shape.k))[:2]
    if case.rows < PREFILL:
        grid = _nearest_first((16,), (128, 64, 256), sums, (4, 8), (2, 1))
    else:
        grid = _nearest_first((64, 128, 32), (128, 64, 256), sums, (4, 8), (2,))
    for m, n, k, warps, stages in grid:
        blocks = {"block_m": m, "block_n": n, "block_k": k}
        found.append(FIXED | blocks | {"num_warps": warps, "num_stages": stages})
    return found


def _nearest_first(*options: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All combinations, by how many steps they are from the first of each."""
    ordered = sorted(product(*map(enumerate, options)), key=lambda chosen: sum(step for step, _ in chosen))
    return [tuple(value for _, value in chosen) for chosen in ordered]


class Product:
    """A case on a device: inputs, sets of weights, and what plain torch makes of them."""

    def __init__(self, case: Case, max_loras: int, device: torch.device | str, dtype: torch.dtype) -> None:
        shape, rows = case.shape, case.rows
        # vLLM keeps strides by address, for ever: those of a case before would be taken for this one's.
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(of)

        shrinks = case.operator == "shrink"
        widths = [shape.n] * shape.slices if shrinks else shape.widths
        size = sum(widths) * shape.k * dtype.itemsize
        self.sets = max(2, min(64, math.ceil(MOVED / size))) if rows < PREFILL else 2
        weights = [[random(1, 1, width, shape.k) * 0.02 for width in widths] for _ in range(self.sets)]
        meta = LoRAKernelMeta.make(max_loras, rows, device=device)
        meta.prepare_tensors(torch.zeros(rows, dtype=torch.int32, device=device))
        arguments = meta.meta_args(rows, False)
        if shrinks:
            x = random(rows, shape.k)
            self.out = torch.zeros(shape.slices, rows, shape.n, device=device, dtype=torch.float32)
            # Slot 0 of a plain adapter: its gates are 1.
            linears = {each[0].data_ptr(): [""] * shape.slices for each in weights}
            tables = GateTables(linears, rows, 1, shape.n, device)
            self.run: Run = lambda number: gated_shrink(x, weights[number], self.out, tables, arguments, 1.0)
            self.expected = torch.stack([x.float() @ each[0, 0].float().t() for each in weights[0]])
        else:
            shrunk = random(shape.slices, rows, shape.k, of=torch.float32)
            self.out = torch.zeros(rows, sum(widths), device=device, dtype=dtype)
            self.run = lambda number: lora_expand_op._lora_expand(
                shrunk, weights[number], self.out, *arguments, offset_start=0, add_inputs=True
            )
            parts = zip(shrunk.to(dtype).float(), weights[0], strict=True)
            self.expected = torch.cat([part @ each[0, 0].float().t() for part, each in parts], 1)

    def error(self) -> float:
        """Run once, and return the distance from plain torch as a share of the result's norm."""
        self.out.zero_()
        self.run(0)
        return float((self.out.float() - self.expected).norm() / self.expected.norm())


@contextmanager
def chosen_configs() -> Iterator[None]:
    """Kernels take the configuration set by `using`, in each thread its own."""
    lookups = [(module, module.get_lora_op_configs) for module in (utils, lora_expand_op)]
    loader = utils.load_lora_op_config
    utils.load_lora_op_config = lambda operator, add_inputs: None  # vLLM's defaults, whatever the environment names
    for module, _ in lookups:
        module.get_lora_op_configs = lambda *arguments, **named: _config.get()
    try:
        yield
    finally:
        utils.load_lora_op_config = loader
        for module, lookup in lookups:
            module.get_lora_op_configs = lookup


def default_config(case: Case, max_loras: int) -> Config:
    """What vLLM chooses where it has no file: within `chosen_configs` it sees none."""
    shape = case.shape
    found: Config = _vllms_choice(
        case.operator,
        max_loras=max_loras + 1,
        batch=case.rows,
        hidden_size=shape.k if case.operator == "shrink" else shape.n,
        rank=shape.n if case.operator == "shrink" else shape.k,
        num_slices=shape.slices,
        add_inputs=None if case.operator == "shrink" else True,
    )
    return dict(found)


def search(
    shapes: LoRAShapes,
    max_loras: int,
    seconds: float,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    timer: Timer,
    rows: tuple[int, ...] = ROWS,
    workers: int | None = None,
) -> list[Best]:
    """The best configuration of each case that was found in about so many seconds; at least each default is timed.

    Raises `XloomError` where the default computes something else than plain torch. `workers` compile side by side.
    """
    todo = cases(shapes, rows)
    found = []
    with chosen_configs(), ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        until = time.monotonic() + seconds
        for number, case in enumerate(todo):
            # What is left of the time, shared among the cases that are left.
            share = time.monotonic() + max(0.0, until - time.monotonic()) / (len(todo) - number)
            made = Product(case, max_loras, device, dtype)
            found.append(_best(case, made, default_config(case, max_loras), timer, pool, share))
    return found


def _best(case: Case, made: Product, default: Config, timer: Timer, pool: ThreadPoolExecutor, until: float) -> Best:
    _config.set(default)
    if made.error() > TOLERANCE:
        raise XloomError(
            "kernel_wrong",
            f"{case.operator} of {case.rows} rows, {case.shape}, is not what plain torch computes.",
            "Triton, vLLM or the GPU's driver is at fault: do not serve adapters here.",
        )
    default_us = timer(made.run, made.sets)
    best = Best(case, default, default_us, default_us)
    waiting = candidates(case)
    while waiting and time.monotonic() < until:
        batch, waiting = waiting[: pool._max_workers], waiting[pool._max_workers :]
        for config, compiled in zip(batch, pool.map(lambda one: _compiles(made.run, one), batch), strict=True):
            if not compiled or time.monotonic() > until:
                continue
            _config.set(config)
            if made.error() > TOLERANCE:
                continue
            us = timer(made.run, made.sets)
            if us < best.us:
                best = Best(case, config, us, default_us)
    return best


def _compiles(run: Run, config: Config) -> bool:
    """Whether a configuration fits this GPU; its compilation leaves other threads alone."""
    _config.set(config)
    try:
        run(0)
    except Exception:  # shared memory, registers: whatever Triton says of it, this one is out
        return False
    return True


def graph_timer(run: Run, sets: int) -> float:
    """Time of a launch inside a CUDA graph: what an engine pays, without the host's part."""
    for number in range(sets):
        run(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(sets):
            run(number)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / sets)
    return float(sorted(times)[2])


def configs_of(found: list[Best], max_loras: int) -> dict[str, dict[str, Any]]:
    """Files, by suffix, as vLLM reads them."""
    files: dict[str, dict[str, Any]] = {}
    for best in found:
        shape = best.case.shape
        level = files.setdefault("SHRINK" if best.case.operator == "shrink" else "EXPAND_TRUE", {})
        for key in (max_loras + 1, shape.slices, best.case.rows, shape.k):
            level = level.setdefault(str(key), {})
        level[str(shape.n)] = best.config
    return files
