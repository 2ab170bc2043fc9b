"""Which replicas hold which adapters, by their own reports. Memory only: replicas report again after a restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

SILENT_AFTER_S = 10.0
NOT_VERIFIED = "adapter_not_verified"  # the code of one that did not pass its proof


class Refusal(msgspec.Struct, frozen=True):
    """Why an engine does not hold an adapter: an error's code, and all it said."""

    code: str
    reason: str
    verdict: bool = True  # on the files, so that it stays; else the replica goes on trying


class ReplicaReport(msgspec.Struct, frozen=True):
    """What a replica last said."""

    node_id: str
    resident: tuple[str, ...]  # name@generation
    failed: dict[str, Refusal] = {}  # name@generation -> why the engine refused it
    at: float = 0.0  # the clock's seconds


class Residency:
    """The newest report of each replica heard within the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, silent_after_s: float = SILENT_AFTER_S) -> None:
        self._clock = clock
        self._silent_after_s = silent_after_s
        self._reports: dict[str, ReplicaReport] = {}

    def report(self, replica_id: str, node_id: str, resident: Sequence[str], failed: dict[str, Refusal]) -> None:
        """Take a replica's report in place of its earlier one."""
        self._reports[replica_id] = ReplicaReport(node_id, tuple(resident), failed, self._clock())

    def forget(self, replica_id: str) -> None:
        """A replica says goodbye."""
        self._reports.pop(replica_id, None)

    def live(self) -> dict[str, ReplicaReport]:
        """The replicas heard of lately."""
        oldest = self._clock() - self._silent_after_s
        self._reports = {name: report for name, report in self._reports.items() if report.at >= oldest}
        return dict(self._reports)

    def lacking(self, key: str) -> list[str]:
        """The live replicas that do not hold `name@generation`."""
        return sorted(name for name, report in self.live().items() if key not in report.resident)

    def holding(self, key: str) -> list[str]:
        """The live replicas that hold `name@generation`."""
        return sorted(name for name, report in self.live().items() if key in report.resident)

    def failures(self, key: str) -> dict[str, Refusal]:
        """Why live replicas refused `name@generation`, by replica."""
        return {name: report.failed[key] for name, report in self.live().items() if key in report.failed}
