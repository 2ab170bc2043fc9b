"""What a long start is doing: a line that changes on a terminal, and a line for each stage anywhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console

STILL_S = 15.0  # between two lines that say that a stage goes on


class Stages(AbstractContextManager["Stages"]):
    """The stages of one start, one after another, each with its seconds once it is over."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live = console.status("") if console.is_terminal else None
        self._name = self._note = ""
        self._began = self._said = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Stages:
        if self._live is not None:
            self._live.start()
        else:
            threading.Thread(target=self._go_on, daemon=True).start()
        return self

    def _go_on(self) -> None:
        """A stage may be one long call: nobody is there to say that it goes on."""
        while not self._over.wait(STILL_S):
            self.still()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._finish("" if error is None else ", and it failed")
        if self._live is not None:
            self._live.stop()

    def begin(self, name: str) -> None:
        """The stage before is over; this one begins."""
        self._finish()
        self._name, self._note, self._began = name, "", self._clock()
        self._said = self._began
        self._show()

    def still(self, note: str = "") -> None:
        """The stage goes on, and how far it is: call it as often as you like."""
        self._note = note or self._note
        self._show()

    def _show(self) -> None:
        seconds = self._clock() - self._began
        note = f", {self._note}" if self._note else ""
        if self._live is not None:
            self._live.update(f"{self._name}{note} ({seconds:.0f} s)" if seconds >= 1 else f"{self._name}{note}")
        elif self._name and self._clock() - self._said >= STILL_S:
            self._said = self._clock()
            self._print(f"{self._name}: {seconds:.0f} s so far{note}")

    def _finish(self, how: str = "") -> None:
        if self._name and self._live is None:
            self._print(f"{self._name}: {self._clock() - self._began:.1f} s{how}")
        self._name = ""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
