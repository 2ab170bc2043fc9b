"""A machine's routers that are to end: whoever stops the machine asks by a file, and sees when all have answered.

In a folder of the user's own lies a file for each router of a port, called as its process, while the router runs; once
`drain` lies there too, only while it has requests to answer. helm/xloom/files/drain.sh is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

ASKED = "drain"
PERIOD_S = 0.5


def folder_of(port: int, base: Path | None = None) -> Path:
    """Where the routers of a port and who asks them to drain meet."""
    return (base or Path(tempfile.gettempdir())) / f"xloom-routers-{os.getuid()}" / str(port)


class Draining:
    """One router's part. Without a folder that is the user's own it is never asked."""

    def __init__(self, port: int, answers: Callable[[], int], asked: Callable[[bool], None]) -> None:
        """`answers`: how many requests it is answering; `asked` is told of each change."""
        self._folder = folder_of(port)
        self._file = self._folder / str(os.getpid())
        self._answers, self._asked = answers, asked
        self._is_asked = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Say that this router is there, and begin to look whether it is asked to drain."""
        with contextlib.suppress(OSError):
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                found = folder.lstat()
                if found.st_uid != os.getuid() or folder.is_symlink():
                    return
            self._file.touch()
            self._task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        """Look once."""
        asked = (self._folder / ASKED).exists()
        if asked != self._is_asked:
            self._is_asked = asked
            self._asked(asked)
        with contextlib.suppress(OSError):
            if asked and not self._answers():
                self._file.unlink(missing_ok=True)
            elif not self._file.exists():
                self._file.touch()

    def close(self) -> None:
        """It has ended."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
