"""Walk-through pages as tests see them: their commands in order, which are run here, and how one is run.

A block of commands is fenced with ```sh. One that this machine can't run says so in its first line, where a reader
sees it: `# not run here: REASON`. All others are run as they stand, but for names that only the reader knows
(addresses, ports, folders), which a test replaces. One that says Ctrl-C stays in the foreground until then.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WALK_THROUGHS = ("kubernetes.md", "monitoring.md", "ray-clusters.md")
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"# not run here: (\S.*)")
TIMEOUT_S = 450
STOP_S = 60


@dataclass(frozen=True)
class Block:
    """One block of commands."""

    page: str
    line: int  # of its first command
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why it is not run here."""
        found = NOT_RUN.match(self.text)
        return found[1] if found else None

    @property
    def stays(self) -> bool:
        """Whether it runs until Ctrl-C."""
        return "Ctrl-C" in self.text

    @property
    def commands(self) -> list[list[str]]:
        """Its commands as words, lines that go on joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str, heading: str | None = None) -> list[Block]:
    """All of a page in `docs`, or of its section under a heading of the second level."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    start = 0 if heading is None else text.index(f"{heading}\n")
    end = text.find("\n## ", start) if heading is not None else -1
    found = FENCE.finditer(text, start, len(text) if end < 0 else end)
    return [Block(page, text.count("\n", 0, each.start(1)) + 1, each[1]) for each in found]


def to_run(page: str, heading: str | None = None) -> list[Block]:
    """Those that are run, in order."""
    return [block for block in blocks(page, heading) if block.reason is None]


class Reader:
    """Someone who follows a page: a folder that looks like the checkout, an environment, and what they know.

    `names` are what stands in the page and what is meant by it here; the longest is replaced first.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], names: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        self.names = dict(names or {})
        for entry in ROOT.iterdir():  # what commands write is not written into the checkout
            (folder / entry.name).symlink_to(entry)

    def script(self, block: Block) -> str:
        """The block with names replaced."""
        text = block.text
        for name in sorted(self.names, key=len, reverse=True):
            text = text.replace(name, self.names[name])
        return text

    def run(self, block: Block) -> str:
        """Run it to its end; returns what it printed. Fails with that unless every command succeeds."""
        assert block.reason is None
        assert not block.stays
        done = subprocess.run(
            self._command(block), cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block} ended with {done.returncode}\n{self.script(block)}\n{done.stdout}"
        return done.stdout

    @contextmanager
    def running(self, block: Block, ready: str) -> Iterator[str]:
        """Run it until what it prints matches `ready`, and on to the end of the `with`: Ctrl-C then ends it well."""
        assert block.stays
        process = subprocess.Popen(
            self._command(block), cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        said, seen, timer = [], threading.Event(), threading.Timer(TIMEOUT_S, process.kill)

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    said.append(line)
                    if re.search(ready, "".join(said)):
                        seen.set()
            seen.set()

        reading = threading.Thread(target=read)
        reading.start()
        timer.start()
        try:
            seen.wait()
            assert re.search(ready, "".join(said)), f"{block} never said {ready}\n{''.join(said)}"
            timer.cancel()
            yield "".join(said)
        finally:
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            try:
                code = process.wait(STOP_S)
            finally:
                process.kill()
                reading.join(STOP_S)
        assert code == 0, f"{block} ended with {code}\n{''.join(said)}"

    def _command(self, block: Block) -> list[str]:
        return ["bash", "-euo", "pipefail", "-c", self.script(block)]
