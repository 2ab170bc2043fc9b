"""Quantised models on disk by content, shared by the processes of a node: one makes a model, the others wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xloom.protocol import XloomError

logger = logging.getLogger(__name__)

DONE_FILE = "xloom_quantised.json"  # what was done, and the files with their sizes; written last
POLL_S = 0.1
SAY_S = 15.0  # how often a waiting process says so
_CHUNK = 1 << 22


class QuantisedCache:
    """A folder of quantised models, `<key>/`, with a lock file beside each.

    Who makes a model holds `<key>.lock`, writes a folder of its own beside and renames it when all is there. The kernel
    drops the lock with its process, however that ends; the next holder removes what was left.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser()

    def path(self, key: str) -> Path:
        """Where the model of a key is, or will be."""
        return self._folder / key

    def find(self, key: str) -> Path | None:
        """The finished model of a key, if it is there and whole."""
        target = self.path(key)
        try:
            done = read_done(target)
            whole = all((target / name).stat().st_size == size for name, size in done["files"].items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return target if whole else None

    def ensure(self, key: str, make: Callable[[Path], dict[str, Any]]) -> Path:
        """The model of a key, made by `make(folder)` when it is not there; what `make` returns is kept with it.

        Raises `XloomError` (isq_cache_unwritable), and what `make` raises, after which nothing of it is left.
        """
        found = self.find(key)
        if found is not None:
            return found
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                found = self.find(key)
                if found is None:
                    found = self._make(key, make)
                return found
        except OSError as error:
            raise XloomError(
                "isq_cache_unwritable",
                f"The cache of quantised models {self._folder} failed: {error}.",
                "Free disk space there, or set isq.cache to another folder.",
                500,
            ) from None

    def _make(self, key: str, make: Callable[[Path], dict[str, Any]]) -> Path:
        target = self.path(key)
        for left in self._folder.glob(f"{key}.part-*"):  # of a process that was killed: this one holds the lock
            shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f"{key}.part-", dir=self._folder))
        try:
            part.chmod(0o755)
            record = make(part)
            files = {str(file.relative_to(part)): file.stat().st_size for file in part.rglob("*") if file.is_file()}
            for name in files:
                _sync(part / name)
            (part / DONE_FILE).write_text(json.dumps(record | {"files": files}, indent=1) + "\n", encoding="utf-8")
            _sync(part / DONE_FILE)
            if target.exists():  # found damaged
                shutil.rmtree(target)
            part.rename(target)
            _sync(self._folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        descriptor = os.open(self._folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            said = 0.0
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() - said > SAY_S:
                        said = time.monotonic()
                        logger.warning("another process of this node is quantising this model: waiting for it")
                    time.sleep(POLL_S)
            yield
        finally:
            os.close(descriptor)


def read_done(folder: Path) -> dict[str, Any]:
    """What was done to make a quantised folder. Raises `OSError` or `ValueError` when it is not one."""
    done: dict[str, Any] = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
    return done


def model_digest(folder: Path, memory: Path) -> str:
    """A hash of all of a model's files: names and contents.

    A file's own hash is kept in the folder `memory` by its path, size and time, since models are large; in the hub's
    cache the blob's name is the hash.
    """
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"):
            total.update(f"{file.name}\0{_file_digest(file, memory)}\n".encode())
    return total.hexdigest()


def _file_digest(file: Path, memory: Path) -> str:
    real = file.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    stat = real.stat()
    identity = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}"
    note = memory / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    with contextlib.suppress(OSError):
        known = note.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    digest = hashlib.sha256()
    with real.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    with contextlib.suppress(OSError):  # a cache that can't be written is complained of where it matters
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest.hexdigest(), encoding="ascii")
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
