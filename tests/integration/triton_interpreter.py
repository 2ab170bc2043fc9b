# ruff: noqa: E402 - the environment and the backend come before the imports that read them
"""Run as a program: vLLM's Triton LoRA wrapper with our shrink, in Triton's interpreter, on a fake device.

Prints a line of JSON for each check: its name, and what was found. A process of its own, since vLLM and Triton
decide at import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["TRITON_INTERPRET"] = "1"

from types import SimpleNamespace
from typing import Any

import triton.backends

# vllm.triton_utils.importing (0.32) uses Triton on a CPU build only when Triton names a CPU backend.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops import lora_shrink_op, utils
from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import async_tensor_h2d

from tests.integration.fake_gpu import DEVICE, DeviceError, FakeGPU, FakeTensor, held
from tests.unit.vllm.plugin.routings import routing
from xloom.mixtures.routing.arrow import ArrowRouting
from xloom.mixtures.routing.inputs import InputRouting, with_absent
from xloom.mixtures.routing.linear import LinearRouting
from xloom.vllm.plugin import punica_gpu
from xloom.vllm.plugin.gates import BATCH, SlotRouting
from xloom.vllm.plugin.punica_gpu import GatedPunicaGPU

MAX_TOKENS, WIDTH, RANK, SLOTS = 40, 64, 32, 4
HALF = torch.float16  # what the kernels take
NAMES = ["m.q_proj", "m.k_proj", "m.o_proj"]
LINEARS = {"m.qkv_proj": ((32, 16), NAMES[:2]), "m.o_proj": ((48,), NAMES[2:])}  # widths of the slices, and their names
PLAIN, PAIR, CROWD, THREE = 11, 12, 13, 14  # adapter ids; each has the slot of its place
ARROW, LINEAR = CROWD, THREE  # in other benches
PAIRED = [[(0, 4), (1, 8)], [(1, 8)], [(0, 4), (1, 8)]]  # the first adapter lacks k_proj
CROWDED = [[(adapter, 1) for adapter in range(20)]] * 3
THREEFOLD = [[(0, 8), (1, 8), (2, 16)]] * 2  # the bundle has no o_proj


class Manager:
    """The part of vLLM's LoRAModelManager that the wrapper reads, with adapters in its slots."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = {name: self._stacked(generator, [(RANK, WIDTH)] * len(outs)) for name, (outs, _) in LINEARS.items()}
        self.b = {name: self._stacked(generator, [(out, RANK) for out in outs]) for name, (outs, _) in LINEARS.items()}
        self.modules = {name: SimpleNamespace(lora_a_stacked=stacked) for name, stacked in self.a.items()}
        self.packed_modules = {"m.qkv_proj": NAMES[:2]}
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self.lora_config = SimpleNamespace(max_loras=SLOTS, max_lora_rank=RANK, specialize_active_lora=False)
        self._registered_adapters = SimpleNamespace(cache={})

    def _stacked(self, generator: torch.Generator, shapes: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        return tuple(FakeTensor((torch.randn(SLOTS, 1, *shape, generator=generator) / 6).to(HALF)) for shape in shapes)

    def load(self, adapter: int, bundle: SlotRouting | None = None) -> None:
        """Put an adapter into its slot. Ranks beyond its own are zero there, as vLLM leaves them."""
        slot = adapter - PLAIN
        self.lora_index_to_id[slot] = adapter
        loras = {}
        for name, (_, parts) in LINEARS.items():
            ranks = [8 if bundle is None else rank_of(bundle, part) for part in parts]
            for stacked, rank in zip(self.a[name], ranks, strict=True):
                held(stacked)[slot, 0, rank:] = 0
            made = [torch.zeros(rank, WIDTH) for rank in ranks]
            loras[name] = SimpleNamespace(lora_a=made if len(parts) > 1 else made[0])
        self._registered_adapters.cache[adapter] = SimpleNamespace(loras=loras, xloom_routing=bundle)


def rank_of(bundle: SlotRouting, module: str) -> int:
    return len(bundle.segments[bundle.row[module]]) if module in bundle.row else 0


class Bench:
    """A wrapper on the fake device, and what its answers should be."""

    def __init__(self, wrapper: type[PunicaWrapperGPU] = GatedPunicaGPU) -> None:
        self.manager = Manager()
        self.wrapper = wrapper(MAX_TOKENS, 8, DEVICE, lora_config=self.manager.lora_config)
        if isinstance(self.wrapper, GatedPunicaGPU):
            self.wrapper.attach(self.manager)
        self.generator = torch.Generator().manual_seed(1)
        self.x = FakeTensor(torch.zeros(MAX_TOKENS, WIDTH, dtype=HALF))
        self.y = {
            name: FakeTensor(torch.zeros(MAX_TOKENS, sum(outs), dtype=HALF)) for name, (outs, _) in LINEARS.items()
        }
        self.given: dict[int, torch.Tensor] = {}  # adapter -> its gates

    def step(self, ids: list[int], *, gates: bool = True) -> None:
        """All that comes before a forward: inputs, the mapping of rows to adapters, and the gates."""
        self.ids = np.array(ids)
        held(self.x).copy_(torch.randn(MAX_TOKENS, WIDTH, generator=self.generator))
        for y in self.y.values():
            held(y).copy_(torch.randn(y.shape, generator=self.generator))
        self.before = {name: held(y).clone() for name, y in self.y.items()}
        mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
        self.wrapper.update_metadata(mapping, self.manager.lora_index_to_id, SLOTS + 1, 100)
        if not isinstance(self.wrapper, GatedPunicaGPU) or not gates:
            return
        for entry in BATCH.gated():
            assert entry.routing is not None
            count = int((self.ids == entry.adapter_id).sum())
            shape = (count, len(entry.routing.row), entry.routing.routing.num_adapters)
            self.given[entry.adapter_id] = torch.rand(shape, generator=self.generator)
            self.wrapper.set_gates(entry, FakeTensor(self.given[entry.adapter_id].clone()))

    def forward(self, num_tokens: int) -> None:
        for name, (outs, _) in LINEARS.items():
            self.wrapper.add_lora_linear(
                self.y[name][:num_tokens], self.x[:num_tokens], self.manager.a[name], self.manager.b[name], 1.0, outs
            )

    def error(self) -> float:
        """The largest difference from plain torch over the step's rows."""
        rows = len(self.ids)
        errors = [
            (held(self.y[name])[:rows].float() - self.expected(name)[:rows]).abs().max().item() for name in LINEARS
        ]
        return max(errors)

    def expected(self, name: str) -> torch.Tensor:
        wanted = self.before[name].float()
        outs, parts = LINEARS[name]
        for adapter in {int(each) for each in self.ids if each}:
            rows = torch.from_numpy(np.flatnonzero(self.ids == adapter))
            bundle: SlotRouting | None = self.manager._registered_adapters.cache[adapter].xloom_routing
            offset = 0
            for part, out, a, b in zip(parts, outs, self.manager.a[name], self.manager.b[name], strict=True):
                slot = adapter - PLAIN
                shrunk = held(self.x)[rows].float() @ held(a)[slot, 0].float().T
                if bundle is not None and part in bundle.row:
                    number = bundle.row[part]
                    index = bundle.segments[number]
                    shrunk[:, : len(index)] *= self.gates(adapter, bundle, number, rows)[:, index]
                wanted[rows, offset : offset + out] += shrunk @ held(b)[slot, 0].float().T
                offset += out
        return wanted

    def gates(self, adapter: int, bundle: SlotRouting, number: int, rows: torch.Tensor) -> torch.Tensor:
        if bundle.inputs is None:
            return self.given[adapter][:, number]
        weight, bias = (held(each) for each in bundle.inputs.routers[number])
        return bundle.inputs.gates_of(held(self.x)[rows].float() @ weight.T, bias)


def of_inputs(kind: type[InputRouting], segments: list[list[tuple[int, int]]], **options: Any) -> SlotRouting:
    """A mixture whose gates are made of the linears' inputs, on the fake device; each adapter of rank 4."""
    generator = torch.Generator().manual_seed(5)
    names, count = NAMES[: len(segments)], 1 + max(adapter for parts in segments for adapter, _ in parts)
    routers = []
    for parts in segments:
        weight, bias = torch.randn(count, WIDTH, generator=generator) / 4, torch.randn(count, generator=generator)
        bias = torch.zeros(count) if kind is ArrowRouting else bias
        routers.append((FakeTensor(weight), FakeTensor(with_absent(bias, tuple(parts)))))
    shared = {"num_adapters": count, "adapter_names": tuple(map(str, range(count))), "modules": tuple(names)}
    return SlotRouting(kind(**shared, segments=tuple(map(tuple, segments)), routers=tuple(routers), **options))


ARROWED = [[(0, 4), (1, 8), (2, 4)], [(1, 8), (2, 4)], [(0, 4), (2, 4)]]  # each linear lacks another adapter, or none
LINEARLY = [[(adapter, 4) for adapter in range(5)]] * 2


def check_inputs(gpu: FakeGPU) -> list[float]:
    """Gates made of inputs beside given ones and none: one capture, replayed with other rows and other mixtures."""
    BATCH.input_gates = True  # and from here on
    bench = loaded(PLAIN, PAIR)
    softmax = {"activation": "softmax", "temperature": 0.5}
    mixtures = [
        (
            of_inputs(ArrowRouting, ARROWED, top_k=2, **softmax),
            of_inputs(LinearRouting, LINEARLY, top_k=None, **softmax),
        ),
        (
            of_inputs(LinearRouting, LINEARLY, top_k=2, activation="sigmoid", temperature=2.0),
            of_inputs(ArrowRouting, ARROWED, top_k=1, **softmax),
        ),
    ]
    errors = []
    replay = None
    for arrow, linear in mixtures:
        for adapter, mixture in ((ARROW, arrow), (LINEAR, linear)):
            bench.manager.load(adapter, mixture)
            bench.wrapper.reserve(mixture)
        for ids in (MIXED, [ARROW] * 18 + [LINEAR] * 3 + [0, PLAIN], [0, LINEAR, PAIR, ARROW] * 3):
            bench.step(ids)
            if replay is None:
                bench.forward(MAX_TOKENS)
                bench.step(ids)
                with gpu.capture() as replay:
                    bench.forward(MAX_TOKENS)
                bench.step(ids)
            replay()
            errors.append(bench.error())
    return errors


def bundles() -> tuple[SlotRouting, SlotRouting, SlotRouting]:
    return (
        SlotRouting(routing(NAMES, PAIRED)),
        SlotRouting(routing(NAMES, CROWDED, num_adapters=20)),
        SlotRouting(routing(NAMES[:2], THREEFOLD, num_adapters=3)),
    )


def loaded(*adapters: int, wrapper: type[PunicaWrapperGPU] = GatedPunicaGPU) -> Bench:
    bench = Bench(wrapper)
    routings = dict(zip((PAIR, CROWD, THREE), bundles(), strict=True))
    for adapter in adapters:
        bench.manager.load(adapter, routings.get(adapter))
    return bench


MIXED = [PLAIN] * 5 + [0] * 6 + [PAIR] * 9 + [PLAIN] * 4 + [CROWD, 0, CROWD, THREE, CROWD] + [PAIR] * 2 + [0]


SMALL = {"split_k": 2, "block_k": 32}  # the default splits K over 64 programs, most of which find nothing here


@contextmanager
def configured(**chosen: int) -> Iterator[None]:
    """vLLM's lookup of shrink configurations, with something else in what it finds."""
    lookup = utils.get_lora_op_configs
    utils.get_lora_op_configs = lambda op, **of: lookup(op, **of) | (chosen if op == "shrink" else {})
    try:
        yield
    finally:
        utils.get_lora_op_configs = lookup


def check_mixed(gpu: FakeGPU, **chosen: int) -> float:
    bench = loaded(PLAIN, PAIR, CROWD, THREE)
    with configured(**chosen):
        bench.step(MIXED)
        bench.forward(len(MIXED))
    return bench.error()


def check_invariant(gpu: FakeGPU) -> bool:
    """With VLLM_BATCH_INVARIANT a row's answer does not depend on the batch it is in."""
    utils.is_batch_invariant = True
    try:
        bench = loaded(PLAIN, PAIR)
        bench.step([PAIR] * 3)
        bench.forward(3)
        alone = held(bench.y["m.o_proj"])[:3].clone()
        x, y, gates = held(bench.x)[:3].clone(), bench.before["m.o_proj"][:3].clone(), bench.given[PAIR]
        bench.step([PLAIN] * 20 + [PAIR] * 3)
        held(bench.x)[20:23], held(bench.y["m.o_proj"])[20:23] = x, y
        [entry] = BATCH.gated()
        bench.wrapper.set_gates(entry, FakeTensor(gates))
        bench.forward(23)
        return torch.equal(held(bench.y["m.o_proj"])[20:23], alone)
    finally:
        utils.is_batch_invariant = False


def check_replayed(gpu: FakeGPU) -> list[float]:
    """One capture at the full size, replayed with what steps of other sizes and other slots leave in the tensors."""
    bench = loaded(PLAIN, PAIR)
    bench.step([PLAIN] * MAX_TOKENS)
    bench.forward(MAX_TOKENS)  # vLLM runs the model before it captures: its tables of addresses are filled then
    with gpu.capture() as replay:
        bench.forward(MAX_TOKENS)
    errors = []
    for ids in (MIXED[:20], [PAIR] * 3, [0, 0, PAIR, PLAIN, 0] * 5):
        bench.step(ids)
        replay()
        errors.append(bench.error())
    tables = bench.wrapper.tables
    width, place = tables.gates.shape[1], tables.place.data_ptr()
    _, crowd, three = bundles()
    bench.manager.load(CROWD, crowd)
    bench.manager.load(THREE, three)
    for ids in (MIXED, [CROWD] * 7 + [THREE] * 4, [0] * 9):
        bench.step(ids)
        replay()
        errors.append(bench.error())
    assert tables.gates.shape[1] > width
    assert tables.place.data_ptr() == place
    return errors


def check_stale_capture(gpu: FakeGPU) -> float:
    """The same with the address of the gates frozen, as if the kernel had been handed the table: it must be wrong."""
    bench = loaded(PLAIN, PAIR)
    bench.step([PLAIN, PAIR] * (MAX_TOKENS // 2))
    bench.forward(MAX_TOKENS)  # vLLM runs the model before it captures: its tables of addresses are filled then
    with gpu.capture() as replay:
        bench.forward(MAX_TOKENS)
    before = bench.wrapper.tables.gates  # kept, or the replay would read what is not there any more
    frozen = held(bench.wrapper.tables.place).clone()
    bench.manager.load(CROWD, bundles()[1])
    bench.step([CROWD] * 7)
    held(bench.wrapper.tables.place).copy_(frozen)
    held(before).fill_(0.5)
    replay()
    return bench.error()


def check_base_rows(gpu: FakeGPU) -> list[str]:
    """The kernels launched in a step without adapters."""
    bench = loaded(PLAIN, PAIR)
    bench.step([PLAIN] * 3)
    bench.forward(3)
    bench.step([0] * 12)
    gpu.launches.clear()
    bench.forward(12)
    assert bench.error() == 0
    return gpu.launches


def check_kernels(gpu: FakeGPU) -> list[str]:
    """The kernels of a mixed step, of two linears."""
    bench = loaded(PLAIN, PAIR)
    bench.step([PLAIN, PAIR, 0])
    gpu.launches.clear()
    bench.forward(3)
    return gpu.launches


def step_and_wait(bench: Bench, adapter_ids: list[int]) -> None:
    """A step of vLLM's own wrapper, which waits for the device."""
    bench.step(adapter_ids)


def check_plain_is_vllms(gpu: FakeGPU) -> bool:
    """Plain adapters: to the last bit what vLLM's own wrapper gives."""
    ours, theirs = loaded(PLAIN), loaded(PLAIN, wrapper=PunicaWrapperGPU)
    for bench, step in ((ours, Bench.step), (theirs, step_and_wait)):
        step(bench, [PLAIN, 0, PLAIN, PLAIN])
        bench.forward(4)
    return all(torch.equal(held(ours.y[name]), held(theirs.y[name])) for name in LINEARS)


def check_without_gates(gpu: FakeGPU) -> bool:
    """A row whose gates nobody has set."""
    bench = loaded(PLAIN, PAIR)
    bench.step([PLAIN, PAIR], gates=False)
    bench.forward(2)
    plain, pair = (held(bench.y["m.o_proj"])[row] for row in range(2))
    return bool(plain.isfinite().all()) and bool(pair.isnan().all())


def check_same_id_anew(gpu: FakeGPU) -> list[float]:
    """An adapter that comes to a slot under the id of the one before it: a dummy's, or a bundle loaded in place."""
    bench = loaded(PLAIN, PAIR)
    errors = []
    pair = SlotRouting(routing(NAMES, [[(1, 3), (0, 5)]] * 3))
    for bundle in (None, pair, bundles()[0]):
        bench.manager.load(PAIR, bundle)
        bench.step([PAIR] * 4)
        bench.forward(4)
        errors.append(bench.error())
    return errors


def check_wrong_gates(gpu: FakeGPU) -> list[str]:
    """Gates of another shape, and gates on the host, are refused."""
    bench = loaded(PLAIN, PAIR)
    bench.step([PLAIN, PAIR, PAIR])
    [entry] = BATCH.gated()
    refused = []
    for gates in (FakeTensor(torch.ones(2, 3, 3)), FakeTensor(torch.ones(1, 3, 2)), torch.ones(2, 3, 2)):
        try:
            bench.wrapper.set_gates(entry, gates)
        except ValueError as error:
            refused.append(str(error))
    return refused


def check_strict(gpu: FakeGPU) -> list[str]:
    """The faults that the device is there to find: each line once stood in the plugin, or could."""
    gates, number = FakeTensor(torch.ones(3, 6, 4)), FakeTensor(torch.ones(1))
    linears, tokens = FakeTensor(torch.arange(2)), FakeTensor(torch.arange(4))
    zeros = torch.zeros(1, 2, 3).transpose(0, 1).expand(2, 4, 3)
    faults = [
        lambda: gates.__setitem__((linears[:, None], tokens[None, :], slice(3)), zeros),  # zeros of the host
        lambda: gates[torch.arange(2)],
        lambda: gates.index_copy_(0, torch.arange(3), gates),
        lambda: gates.copy_(torch.ones(3, 6, 4)),
        lambda: gates.cpu(),
        lambda: number.item(),
        lambda: torch.ops.vllm.xloom_gated_shrink(*handed_the_host()),
    ]
    found = []
    for fault in faults:
        try:
            fault()
        except DeviceError as error:
            found.append(str(error))
    return found


def handed_the_host() -> tuple[Any, ...]:
    """Arguments of a shrink whose `counts` lie on the host."""
    bench = loaded(PLAIN)
    bench.step([PLAIN])
    meta = list(bench.wrapper.token_mapping_meta.meta_args(1, False))
    meta[2] = held(meta[2])
    out = torch.zeros(1, 1, RANK, device=DEVICE)
    return bench.x[:1], list(bench.manager.a["m.o_proj"]), out, *meta, 1.0


def main() -> None:
    assert HAS_TRITON
    operators = {
        "vllm::xloom_gated_shrink": punica_gpu.shrink,
        "vllm::lora_shrink": _lora_shrink,
        "vllm::lora_expand": _lora_expand,
    }
    gpu = FakeGPU(operators, async_tensor_h2d.__code__, step_and_wait.__code__)
    checks = {
        "mixed, default": lambda gpu: check_mixed(gpu, split_k=64, block_k=256),
        "mixed, split_k 1": lambda gpu: check_mixed(gpu, split_k=1, block_k=32),
        "mixed, split_k 4": lambda gpu: check_mixed(gpu, split_k=4, block_k=32, block_m=16),
        "mixed, wide blocks": lambda gpu: check_mixed(gpu, split_k=3, block_k=32, block_n=32, group_size_m=1),
        "invariant": check_invariant,
        "replayed": check_replayed,
        "stale capture": check_stale_capture,
        "base rows": check_base_rows,
        "kernels": check_kernels,
        "plain is vLLM's": check_plain_is_vllms,
        "without gates": check_without_gates,
        "same id anew": check_same_id_anew,
        "wrong gates": check_wrong_gates,
        "strict": check_strict,
        "of inputs": check_inputs,
    }
    # vLLM's own module took its lookup at import, and gets the same.
    lora_shrink_op.get_lora_op_configs = lambda op, **of: utils.get_lora_op_configs(op, **of)
    with gpu.running(), configured(**SMALL):
        for name, check in checks.items():
            print(json.dumps({"check": name, "found": check(gpu)}), flush=True)


if __name__ == "__main__":
    main()
