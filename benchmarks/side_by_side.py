"""Two servers on one machine under the same loads in turn: the rounds, and what each run cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .client import Client, Load, Run
from .metrics import first_tokens, means
from .processes import Memory, cpu_seconds, machine_cpu_seconds, memory
from .servers import Server

IDLE_SECONDS = 4.0
MOST_OTHER_CORES = 0.3  # cores; the idle server is among these others


@dataclass(frozen=True)
class Sample:
    """One run against one server."""

    run: Run
    cpu: dict[str, float]  # seconds, by part, the client's among them
    first_tokens: dict[str, float]  # mean milliseconds, as the server's own metrics have them
    other_cores: float  # cores that all else on the machine used meanwhile: a run is worth little unless this is near 0


@dataclass
class Side:
    """All runs of one server in one comparison."""

    name: str
    samples: dict[int, list[Sample]] = field(default_factory=dict)  # by concurrency
    idle: dict[str, float] = field(default_factory=dict)  # share of one core, by part, with nothing to do
    memory: dict[str, Memory] = field(default_factory=dict)

    def median(self, concurrent: int, value: Callable[[Sample], float]) -> float:
        """The median of a value over the rounds."""
        return statistics.median(value(sample) for sample in self.samples[concurrent])

    def cpu_per_token(self, concurrent: int) -> dict[str, float]:
        """Microseconds of CPU per output token by part, medians of the rounds."""
        parts = {part for sample in self.samples[concurrent] for part in sample.cpu}
        return {part: self.median(concurrent, _cpu_of(part)) for part in parts}


def _cpu_of(part: str) -> Callable[[Sample], float]:
    return lambda sample: 1e6 * sample.cpu.get(part, 0.0) / sample.run.output_tokens


@dataclass
class SideBySide:
    """A server beside the baseline, in rounds that alternate."""

    baseline: Side
    rival: Side

    def ratios(self, concurrent: int) -> list[float]:
        """Throughput of the rival divided by the baseline's, a round each."""
        pairs = zip(self.rival.samples[concurrent], self.baseline.samples[concurrent])
        return [rival.run.throughput / baseline.run.throughput for rival, baseline in pairs]

    def ratio(self, concurrent: int) -> float:
        """Ratio of the medians of throughput."""
        return self._medians(concurrent, lambda sample: sample.run.throughput)[0]

    def added_first_token(self, concurrent: int) -> float:
        """Milliseconds: difference of the medians of time to first token."""
        return self._medians(concurrent, lambda sample: sample.run.ttft)[1]

    def other_cores(self, concurrent: int) -> float:
        """Cores: the most that others used during a run."""
        samples = [*self.baseline.samples[concurrent], *self.rival.samples[concurrent]]
        return max(sample.other_cores for sample in samples)

    def disturbed(self, concurrent: int) -> bool:
        """Whether others used so much of the machine that the figures say nothing."""
        return self.other_cores(concurrent) > MOST_OTHER_CORES

    def _medians(self, concurrent: int, value: Callable[[Sample], float]) -> tuple[float, float]:
        rival, baseline = self.rival.median(concurrent, value), self.baseline.median(concurrent, value)
        return rival / baseline, rival - baseline


def run_side_by_side(
    baseline: Server, rival: Server, client: Client, loads: Sequence[Load], rounds: int, tell: Callable[[str], Any]
) -> SideBySide:
    """Warm both up, then alternate; who goes first alternates too, so that drift favours neither."""
    both = SideBySide(Side(baseline.kind.name), Side(rival.kind.name))
    sides = [(both.baseline, baseline), (both.rival, rival)]
    for _, server in sides:
        for load in loads:
            tell(f"warming up {server.kind.name}, {load.concurrent} at a time")
            client.run(
                server.port, Load(load.concurrent, load.concurrent, load.input_tokens, 16), seed=9_000 + load.concurrent
            )
    for side, server in sides:
        tell(f"{server.kind.name} idle")
        side.idle = _idle(server)
    for number in range(rounds):
        for load in loads:
            for side, server in sides if number % 2 == 0 else sides[::-1]:
                tell(f"round {number + 1} of {rounds}: {server.kind.name}, {load.concurrent} at a time")
                # Prompts of a round are the same for both, and new to both: nothing is found in a prefix cache.
                seed = 1_000 * number + load.concurrent
                sample = _sample(server, client, load, seed)
                side.samples.setdefault(load.concurrent, []).append(sample)
                rate, others = sample.run.throughput, sample.other_cores
                tell(f"  {rate:,.0f} tokens/s, first token {sample.run.ttft:.1f} ms; all else used {others:.2f} cores")
    for side, server in sides:
        side.memory = memory(server.root)
    return both


def _sample(server: Server, client: Client, load: Load, seed: int) -> Sample:
    counts = first_tokens(server.url)
    everyone, cpu, own, start = machine_cpu_seconds(), cpu_seconds(server.root), client.cpu_seconds(), time.monotonic()
    run = client.run(server.port, load, seed)
    after, everyone = cpu_seconds(server.root), machine_cpu_seconds() - everyone
    seconds = time.monotonic() - start
    spent = {part: seconds - cpu.get(part, 0.0) for part, seconds in after.items()}
    spent["client"] = client.cpu_seconds() - own
    other_cores = max(0.0, everyone - sum(spent.values())) / seconds
    return Sample(run, spent, means(counts, first_tokens(server.url)), other_cores)


def _idle(server: Server) -> dict[str, float]:
    before, start = cpu_seconds(server.root), time.monotonic()
    time.sleep(IDLE_SECONDS)  # the measurement itself: what it uses in that time
    seconds = time.monotonic() - start
    return {part: (used - before.get(part, 0.0)) / seconds for part, used in cpu_seconds(server.root).items()}
