"""When a peer that says nothing counts as stopped. Its process may be there and its connection open all the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

TICK_S = 1.0  # how often it is looked at
PING_S = 1.0  # how often a router says that it is there; replicas report twice as often
SILENCE_S = 10.0  # while others are heard: the machine is not what is slow;
PATIENCE = 3  # this many times as long where none is: a starved machine is slow, not dead

_Peer = TypeVar("_Peer")


class Silence(Generic[_Peer]):
    """How long each peer has been silent, in the time that this process itself ran.

    A process that was stopped or starved between two looks has heard nothing because it did not listen.
    """

    def __init__(self, after_s: float = SILENCE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._after_s, self._clock = after_s, clock
        self._last_look = clock()
        self._ran = 0.0  # seconds
        self._heard: dict[_Peer, float] = {}

    def heard(self, peer: _Peer) -> None:
        """It said something; the first time, it is watched from now on."""
        self._heard[peer] = self._running()

    def forget(self, peer: _Peer) -> None:
        """It is watched no longer."""
        self._heard.pop(peer, None)

    def look(self) -> list[_Peer]:
        """Those that count as stopped. To be called every `TICK_S`."""
        self._ran, self._last_look = self._running(), self._clock()
        silent = {peer: self._ran - heard for peer, heard in self._heard.items()}
        others = any(seconds < self._after_s / 2 for seconds in silent.values())
        limit = self._after_s if others else self._after_s * PATIENCE
        return [peer for peer, seconds in silent.items() if seconds > limit]

    def _running(self) -> float:
        """Seconds that this process has run for."""
        return self._ran + min(self._clock() - self._last_look, 2 * TICK_S)
