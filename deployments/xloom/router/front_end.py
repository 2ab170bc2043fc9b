"""What a router asks of the front end behind its port: the seam to vLLM's, which the composition root hands in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from xloom.adapters.manifest import Manifest
from xloom.router.dispatch import Dispatcher
from xloom.settings import Settings


class FrontEnd(Protocol):
    """An OpenAI-compatible application over a dispatcher."""

    app: Any  # FastAPI

    def take(self, manifest: Manifest) -> None:
        """Serve a manifest's entries from now on."""

    def reword(self, message: str) -> str:
        """A message of the front end's in the words of the settings."""

    async def check_health(self) -> None:
        """Raise when it no longer works."""

    def shutdown(self) -> None:
        """Stop what was started."""


OpenFrontEnd = Callable[[Settings, Dispatcher], Awaitable[FrontEnd]]
