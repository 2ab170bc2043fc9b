"""The router's HTTP server: uvicorn on a socket of its own, inside the Serve replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from math import ceil

import uvicorn

from xloom.router.connection import limited
from xloom.router.errors import App
from xloom.router.port_claim import PortClaim
from xloom.settings import LimitSettings

CLOSE = (b"connection", b"close")


class _Server(uvicorn.Server):
    """Leaves signals to the process it runs in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpListener:
    """Serves an ASGI app on a host and port that one deployment's routers of a machine share."""

    def __init__(self, app: App, host: str, port: int, owner: str, limits: LimitSettings) -> None:
        """`owner` names the deployment. Raises `XloomError` (port_in_use)."""
        self._claim = PortClaim(host, port, owner)
        self._socket = self._claim.socket
        config = uvicorn.Config(
            app,
            http=limited(limits),
            ws="none",
            log_config=None,  # the process's own: xloom.observability.logs
            log_level="warning",
            access_log=False,
            timeout_keep_alive=ceil(limits.keep_alive_s),
            lifespan="on",
        )
        self.server: uvicorn.Server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it has, also when it was asked for any."""
        port: int = self._socket.getsockname()[1]
        return port

    async def start(self) -> None:
        """Begin to accept."""
        self._task = asyncio.create_task(self.server.serve(sockets=[self._socket]))
        while not self.server.started:
            if self._task.done():
                await self._task
                raise RuntimeError("the HTTP server ended as it started")
            await asyncio.sleep(0.01)

    def check(self) -> None:
        """Raise when it has ended."""
        if self._task is None or self._task.done():
            raise RuntimeError("the HTTP server has ended")

    @property
    def answers(self) -> int:
        """Requests that are being answered."""
        return len(self.server.server_state.tasks)

    def keep_connections(self, keep: bool) -> None:
        """Whether connections outlive their answers; where not, each answer says so, from the next second on.

        Relies on `uvicorn.Server.on_tick` (0.54), which takes `Config.encoded_headers` up once a second.
        """
        headers = self.server.config.encoded_headers
        if keep is (CLOSE in headers):
            (headers.remove if keep else headers.append)(CLOSE)

    async def close(self, grace_s: float = 0.0) -> None:
        """Accept no more, let answers under way finish for that many seconds, then stop."""
        self.server.config.timeout_graceful_shutdown = ceil(grace_s)
        self.server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._claim.close()
