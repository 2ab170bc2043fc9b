"""Folders by key that the processes of a node share: whole or not there at all, each with file locks beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from xloom.storage.durable import sync, sync_tree


class FolderCache:
    """`<key>/` in one folder, with lock files `<key>.<purpose>`.

    A folder is written beside its place and renamed when all of it is on the disk. The kernel drops a lock (flock)
    with its process, however that ends; the next who makes the folder removes what was left. Raises `OSError`.
    """

    def __init__(self, folder: Path, is_whole: Callable[[Path], bool]) -> None:
        self.folder = folder.expanduser()
        self._is_whole = is_whole

    def path(self, key: str) -> Path:
        """Where the folder of a key is, or will be."""
        return self.folder / key

    def find(self, key: str) -> Path | None:
        """The folder of a key, if it is there and whole."""
        path = self.path(key)
        return path if path.is_dir() and self._is_whole(path) else None

    @contextlib.contextmanager
    def make(self, key: str) -> Iterator[Path]:
        """An empty folder that takes its place when the block ends well. The caller holds the lock for that."""
        for left in self.folder.glob(f"{key}.part-*"):  # of a process that was killed: its lock is free
            shutil.rmtree(left, ignore_errors=True)
        damaged = self.folder / f"{key}.old"
        shutil.rmtree(damaged, ignore_errors=True)
        part, target = self.folder / f"{key}.part-{uuid.uuid4().hex}", self.path(key)
        part.mkdir()
        try:
            yield part
            sync_tree(part)
            if target.exists():
                target.rename(damaged)
            part.rename(target)
            sync(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(damaged, ignore_errors=True)

    def remove(self, key: str, purposes: Collection[str]) -> None:
        """Delete a folder and its lock files. The caller holds one of them alone, and names it last."""
        shutil.rmtree(self.path(key), ignore_errors=True)
        for purpose in purposes:
            self.lock_path(key, purpose).unlink(missing_ok=True)

    def lock_path(self, key: str, purpose: str) -> Path:
        """The lock file of a key for one purpose."""
        return self.folder / f"{key}.{purpose}"

    def try_lock(self, key: str, purpose: str, *, shared: bool = False) -> int | None:
        """A descriptor that holds the lock until it is closed; None while another one holds it."""
        path = self.lock_path(key, purpose)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):  # another one holds it, or removed the file meanwhile
            pass
        os.close(descriptor)
        return None
