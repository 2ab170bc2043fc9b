"""Mixtures that requests ask for by weights alone: how the store names one, and which give way to others."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping

from xloom.protocol import REQUESTS, XloomError, adapter_key

HOLD_S = 30.0  # one that was used so lately gives way to no other


def request_mixture_name(parts: Mapping[str, str]) -> str:
    """The name of what is stacked of these adapters (name -> generation), in whatever order; weights are no part of it.

    Names of other entries can't begin so.
    """
    keys = sorted(adapter_key(name, generation) for name, generation in parts.items())
    return REQUESTS + hashlib.sha256("\0".join(keys).encode()).hexdigest()[:16]


class Uses:
    """When each was last used, as routers say; memory only. One that is not known counts as used just now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at: dict[str, float] = {}

    def mark(self, names: Collection[str]) -> None:
        """They are in use."""
        now = self._clock()
        self._at |= dict.fromkeys(names, now)

    def idle(self, there: Collection[str], idle_s: float) -> list[str]:
        """Those that nobody has used for so long."""
        self._settle(there)
        oldest = self._clock() - idle_s
        return [name for name in there if self._at[name] < oldest]

    def to_give_way(self, there: Collection[str], most: int) -> list[str]:
        """Those that make room for one more, used longest ago first.

        Raises `XloomError` (mixtures_busy) where all were used lately.
        """
        self._settle(there)
        wanted = max(0, len(there) + 1 - most)
        found = sorted(there, key=self._at.__getitem__)[:wanted]
        if len(found) < wanted or any(self._at[name] > self._clock() - HOLD_S for name in found):
            raise XloomError(
                "mixtures_busy",
                f"Requests use {len(there)} sets of adapters by weights, as many as are kept, and this is another.",
                "Retry later, mix the same adapters as others do, or have the operator raise "
                "store.request_mixtures.most.",
                503,
            )
        return found

    def _settle(self, there: Collection[str]) -> None:
        now = self._clock()
        self._at = {name: self._at.get(name, now) for name in there}
