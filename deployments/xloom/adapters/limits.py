"""The most that one source may bring in, and what is left of that while it is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from xloom.protocol import XloomError

_ENTRIES = 10  # files and folders that may be listed, for each that may be taken
_POLL_S = 0.05


@dataclass(frozen=True)
class Limits:
    """The most one source may bring in."""

    files: int = 2000
    size: int = 8 * 2**30  # bytes
    depth: int = 8  # folders in folders
    seconds: float = 600.0
    stall_s: float = 30.0  # without a byte or a name


class Budget:
    """What is left of the limits. A reader says what it takes; whoever waits for it can give it up.

    Its methods raise `XloomError`: source_too_large, source_too_slow.
    """

    def __init__(self, source: str, limits: Limits, *, inner: bool = True) -> None:
        self.limits = limits
        self.inner = inner  # whether the source's own host may have an address of an inner network
        self.source = source
        self._began = self._heard = time.monotonic()
        self._bytes = limits.size
        self._entries = _ENTRIES * limits.files
        self._silent = False  # a library reads, and says nothing meanwhile
        self._given_up = False

    def heard(self) -> None:
        """Something came of the source."""
        if self._given_up or self._late():
            raise self._too_slow(f"it was not read within {self.limits.seconds:g} s")
        self._heard = time.monotonic()

    def entry(self, depth: int) -> None:
        """One more file or folder is listed, within so many folders."""
        self.heard()
        self._entries -= 1
        if self._entries < 0:
            raise self.too_large(f"more than {_ENTRIES * self.limits.files} files and folders")
        if depth > self.limits.depth:
            raise self.too_large(f"folders more than {self.limits.depth} deep")

    def take(self, count: int) -> None:
        """So many bytes more have come."""
        self.heard()
        self.expect(count)
        self._bytes -= count

    def expect(self, count: int) -> None:
        """So many bytes more are to come."""
        if count > self._bytes:
            raise self.too_large(f"more than {self.limits.size} bytes")

    @contextmanager
    def silent(self) -> Iterator[None]:
        """While a library reads that has limits of its own on what does not answer."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False
            self._heard = time.monotonic()

    def run(self, read: Callable[[], None]) -> None:
        """Read in a thread of its own, waited for no longer than the limits allow; what `read` raises."""
        raised: list[BaseException] = []

        def reading() -> None:
            try:
                read()
            except BaseException as error:
                raised.append(error)

        # A library that waits for an answer can't be interrupted: it is left behind, and ends at its next word.
        reader = threading.Thread(target=reading, name="xloom-source", daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(_POLL_S)
            if not reader.is_alive():
                break
            if self._late():
                self._given_up = True
                raise self._too_slow(f"it was not read within {self.limits.seconds:g} s")
            if not self._silent and time.monotonic() - self._heard > self.limits.stall_s:
                self._given_up = True
                raise self._too_slow(f"nothing came for {self.limits.stall_s:g} s")
        if raised:
            raise raised[0]

    def too_large(self, what: str) -> XloomError:
        """The error for a source that holds too much."""
        return XloomError(
            "source_too_large",
            f"The source {self.source!r} holds {what}.",
            "Name the folder of one adapter or bundle alone, or raise the limit in store.limits.",
        )

    def _too_slow(self, why: str) -> XloomError:
        cure = "Check the source's server and the network, or raise the limit in store.limits."
        return XloomError("source_too_slow", f"The source {self.source!r} is too slow: {why}.", cure, 504)

    def _late(self) -> bool:
        return time.monotonic() - self._began > self.limits.seconds
