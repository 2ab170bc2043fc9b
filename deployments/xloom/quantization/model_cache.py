"""Quantised models on disk by content, shared by the processes of a node: one makes a model, the others wait for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xloom.protocol import XloomError
from xloom.storage.folder_cache import FolderCache

logger = logging.getLogger(__name__)

DONE_FILE = "xloom_quantised.json"  # what was done, and the files with their sizes
POLL_S = 0.1
SAY_S = 15.0  # how often a waiting process says so
_CHUNK = 1 << 22


class QuantisedModelCache:
    """A folder of quantised models, `<key>/`. Who makes a model holds `<key>.lock`."""

    def __init__(self, folder: Path) -> None:
        self._models = FolderCache(folder, _is_whole)

    def path(self, key: str) -> Path:
        """Where the model of a key is, or will be."""
        return self._models.path(key)

    def find(self, key: str) -> Path | None:
        """The finished model of a key, if it is there and whole."""
        return self._models.find(key)

    def ensure(self, key: str, make: Callable[[Path], dict[str, Any]]) -> Path:
        """The model of a key, made by `make(folder)` when it is not there; what `make` returns is kept with it.

        Raises `XloomError` (isq_cache_unwritable), and what `make` raises, after which nothing of it is left.
        """
        found = self.find(key)
        if found is not None:
            return found
        try:
            self._models.folder.mkdir(parents=True, exist_ok=True)
            lock = self._lock(key)
            try:
                return self.find(key) or self._make(key, make)
            finally:
                os.close(lock)
        except OSError as error:
            raise XloomError(
                "isq_cache_unwritable",
                f"The cache of quantised models {self._models.folder} failed: {error}.",
                "Free disk space there, or set isq.cache to another folder.",
                500,
            ) from None

    def _make(self, key: str, make: Callable[[Path], dict[str, Any]]) -> Path:
        with self._models.make(key) as folder:
            record = make(folder)
            files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
            (folder / DONE_FILE).write_text(json.dumps(record | {"files": files}, indent=1) + "\n", encoding="utf-8")
        return self.path(key)

    def _lock(self, key: str) -> int:
        """A descriptor that holds the lock of a key; says now and then that it waits for it."""
        said = -SAY_S
        while (descriptor := self._models.try_lock(key, "lock")) is None:
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                logger.warning("another process of this node is quantising this model: waiting for it")
            time.sleep(POLL_S)
        return descriptor


def _is_whole(folder: Path) -> bool:
    try:
        done = read_done(folder)
        return all((folder / name).stat().st_size == size for name, size in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
