"""A port of this machine that one deployment's routers share and nobody else: locks beside the sockets.

Routers listen with SO_REUSEPORT, with which the kernel would deal another deployment's connections out among both.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xloom.protocol import XloomError

_CURE = "Stop what listens there, or choose another with --port."


class PortClaim:
    """A bound socket, and the lock that says whose it is. Both end with the process, or with `close`."""

    def __init__(self, host: str, port: int, owner: str) -> None:
        """Bind as one of `owner`'s routers. Raises `XloomError` (port_in_use). Port 0: any that is free."""
        self._lock: int | None = None
        if port == 0:
            self.socket = _bind(host, port)
            return
        folder = _folder()
        with _locked(folder / "claiming"):
            lock = _open(folder / hashlib.sha256(f"{host}\0{port}".encode()).hexdigest()[:32])
            try:
                self._hold(lock, host, port, owner)
            except BaseException:
                os.close(lock)
                raise
            self._lock = lock

    def _hold(self, lock: int, host: str, port: int, owner: str) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if os.pread(lock, 4096, 0) != owner.encode():
                raise _in_use(host, port, "another xloom deployment listens there") from None
        else:
            check_free(host, port)
            os.ftruncate(lock, 0)
            os.pwrite(lock, owner.encode(), 0)
        self.socket = _bind(host, port, shared=True)
        fcntl.flock(lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go of the port."""
        self.socket.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_free(host: str, port: int) -> None:
    """Raise `XloomError` (port_in_use) when anything listens at the address, also one that shares its port."""
    _bind(host, port).close()


def _bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket; without `shared` it is refused wherever another listens."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise _in_use(host, port, str(error)) from None
    bound.setblocking(False)
    return bound


def _folder() -> Path:
    """The user's own: the kernel lets no two users share a port."""
    folder = Path(tempfile.gettempdir()) / f"xloom-ports-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        raise XloomError("port_in_use", f"{folder} is not a folder of this user's.", "Remove it, or set TMPDIR.")
    return folder


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _open(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _in_use(host: str, port: int, why: str) -> XloomError:
    return XloomError("port_in_use", f"{host}:{port} can't be bound: {why}.", _CURE)
