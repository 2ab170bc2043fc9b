"""What X-LoRA's gates were, as sums over tokens: kept while it runs at little cost, and taken now and then.

Gates are copied as they come and summed many tokens at a time. On a GPU nothing waits for it: sums stay on the
device until a copy of them has arrived.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xloom.mixtures.clock import StepTimes, clock_for
from xloom.mixtures.routing.base import Routing
from xloom.protocol import BundleFigures, MixtureFigures, split_adapter_key

logger = logging.getLogger(__name__)

EVERY_TOKEN = 128  # so many, since the sums were last taken, are all looked at
STEPS = 4  # then of one step in so many
STRIDE = 5  # one token in so many, and their sums are scaled up
BUFFER_ROWS = 256  # gates that wait to be summed: 0.8 MB with 196 modules and 4 adapters

_TINY = torch.finfo(torch.float32).tiny


def summed(gates: Tensor, *, shares: bool) -> Tensor:
    """`[K + 1]`: gates `[num_tokens, M, K]` summed over tokens, then their entropy in nats; both means over modules.

    Gates count by their size: without softmax they may be negative. The entropy is that of `|g_k| / sum_j |g_j|`;
    with `shares` the gates are this already.
    """
    modules = gates.shape[1]
    if not shares:
        gates = gates.abs()
    sums = gates.flatten(1).sum(0).view(modules, -1).sum(0)
    if not shares:
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(_TINY)
    flat = gates.flatten()
    # Not torch.special.entr: on CPU it takes its logarithms one by one (ATen's entr_kernel, torch 2.13).
    entropy = -torch.dot(flat, flat.clamp_min(_TINY).log())
    return torch.cat([sums, entropy.view(1)]) / modules


@dataclass
class _Part:
    """Sums over rows of gates, which stand for some tokens."""

    tokens: int = 0
    rows: int = 0
    sums: Tensor | None = None  # [K + 1], on the gates' device

    def add(self, gates: Tensor, shares: bool) -> None:
        """Sum the gates `[num_rows, M, K]`."""
        new = summed(gates, shares=shares)
        if new.device.type != "mps":  # which has no float64
            new = new.double()
        self.sums = new if self.sums is None else self.sums + new
        self.rows += gates.shape[0]


class GateSums:
    """The sums of one bundle since they were last taken."""

    def __init__(self, routing: Routing) -> None:
        self.names = routing.adapter_names
        self.tokens = 0
        self._shares = routing.gates_sum_to_one
        self._first, self._later = _Part(), _Part()
        self._steps = 0  # that went to `_later`
        self._buffer: Tensor | None = None  # [BUFFER_ROWS, M, K]
        self._filled = 0

    def add(self, gates: Tensor) -> None:
        """Count the gates `[num_tokens, M, K]` of one step."""
        if gates.stride(1) == 0:  # the same at every module: a broadcast view
            gates = gates[:, :1]
        count = gates.shape[0]
        self.tokens += count
        part = self._first
        if self.tokens > EVERY_TOKEN:
            if not self._steps:
                self._settle(self._first)
            part = self._later
            turn, left = divmod(self._steps, STEPS)
            self._steps += 1
            # The first token moves on from turn to turn: every place in a batch is met equally often.
            gates = gates[:0] if left else gates[turn % STRIDE :: STRIDE]
        part.tokens += count
        rows = gates.shape[0]
        if not rows:
            return
        # Copied, not held: memory that comes and goes by the megabyte costs more than the sums.
        if self._buffer is None or self._buffer.shape[1] != gates.shape[1]:  # of constants one step's may be a view
            self._settle(part)
            self._buffer = torch.empty(BUFFER_ROWS, *gates.shape[1:], dtype=gates.dtype, device=gates.device)
        if self._filled + rows > BUFFER_ROWS:
            self._settle(part)
        if rows > BUFFER_ROWS:
            part.add(gates, self._shares)
        else:
            self._buffer[self._filled : self._filled + rows].copy_(gates)
            self._filled += rows

    def _settle(self, part: _Part) -> None:
        """Sum what is in the buffer."""
        if self._filled and self._buffer is not None:
            part.add(self._buffer[: self._filled], self._shares)
        self._filled = 0

    def total(self) -> Tensor | None:
        """`[K + 1]`: gates and entropy, summed over the tokens."""
        self._settle(self._later if self._steps else self._first)
        parts = [part.sums * (part.tokens / part.rows) for part in (self._first, self._later) if part.sums is not None]
        return sum(parts[1:], start=parts[0]) if parts else None


@dataclass
class _Reading:
    """Sums on their way from a GPU."""

    bundles: list[tuple[str, GateSums, Tensor]]  # sums on the host once `arrived` has passed
    times: StepTimes
    arrived: Any


class MixtureTally:
    """The figures of one process. Steps run on one thread; `take` may be called on another.

    Bundles go by name@generation here, and by name in what is taken. Nothing is kept of one whose sums were taken.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._bundles: dict[str, GateSums] = {}
        self._clock = clock_for(self._device)
        self._readings: list[_Reading] = []
        self._failed = False

    def start(self, scaling_share: float | None = None) -> None:
        """A step with X-LoRA tokens begins; with scaling sequences their share of its rows."""
        with self._lock:
            self._clock.start(scaling_share)

    def lap(self) -> None:
        """A part of the step has ended, as `xloom.mixtures.clock` has them."""
        with self._lock:
            self._clock.lap()

    def add(self, name: str, routing: Routing, gates: Tensor) -> None:
        """Count the gates `[num_tokens, M, K]` of one step. Whatever goes wrong, the step goes on."""
        if self._failed:
            return
        try:
            with self._lock:
                sums = self._bundles.get(name)
                if sums is None:
                    sums = self._bundles[name] = GateSums(routing)
                sums.add(gates)
        except Exception:
            self._failed = True
            logger.exception("X-LoRA's gates are no longer counted")

    @torch.inference_mode()
    def take(self) -> tuple[MixtureFigures | None, bool]:
        """The growth since last asked, None for nothing; and whether more is on its way from a GPU."""
        with self._lock:
            bundles, self._bundles = self._bundles, {}
            times = self._clock.take()
        found = [(name, sums, total) for name, sums in bundles.items() if (total := sums.total()) is not None]
        if self._device.type != "cuda":
            return _figures(found, times), False
        if found or times.steps:
            # In the stream of the steps: vLLM calls a worker's methods on the thread that runs them.
            copies = [(name, sums, _to_host(tensor)) for name, sums, tensor in found]
            arrived = torch.cuda.Event()
            arrived.record()
            self._readings.append(_Reading(copies, times, arrived))
        ready = self._readings.pop(0) if self._readings and self._readings[0].arrived.query() else None
        more = bool(self._readings) or self._clock.pending
        return (_figures(ready.bundles, ready.times) if ready is not None else None), more


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that nobody waits for."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _figures(bundles: list[tuple[str, GateSums, Tensor]], times: StepTimes) -> MixtureFigures | None:
    found = []
    for name, sums, tensor in bundles:
        *gates, entropy = tensor.tolist()
        if math.isfinite(sum(gates) + entropy):  # a model that gives NaN shall not spoil the counters for good
            bundle, _generation = split_adapter_key(name)
            found.append(BundleFigures(bundle, sums.tokens, dict(zip(sums.names, gates, strict=True)), entropy))
    if not found and not times.steps:
        return None
    return MixtureFigures(found, times.steps, times.total, times.scaling, times.routing)
