"""Which kinds of adapter a backend can serve as what they are: held against each one it is given, on whatever path."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from xloom.mixtures.options import XLORA_FILE
from xloom.protocol import AdapterRef, XloomError


def check_kind(backend: type[Any], ref: AdapterRef, folder: Path) -> None:
    """Refuse a prepared bundle that a backend would serve as something else, or not at all.

    `backend` is an `LLMBackend`, whose module imports this one. Raises `XloomError` (unsupported_by_backend).
    """
    if not ref.is_mixture:
        return
    can, device = backend.capabilities(), backend.device()
    if device not in can.xlora:
        where = f" on {device}" if can.xlora else ""
        raise _unsupported(f"{ref.name!r} is a mixture, which the engine's backend can't serve{where}.")
    file = folder / XLORA_FILE
    if can.single_pass or not file.is_file():
        return
    if json.loads(file.read_text(encoding="utf-8")).get("routing", {}).get("routing_passes") == 1:
        raise _unsupported(f"{ref.name!r} is routed in one pass, which the engine's backend can't do.")


def checked(add_adapter: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """A backend's `add_adapter` behind `check_kind`."""

    @functools.wraps(add_adapter)
    async def add_checked(self: Any, ref: AdapterRef, path: Path) -> None:
        check_kind(type(self), ref, path)
        await add_adapter(self, ref, path)

    return add_checked


def _unsupported(message: str) -> XloomError:
    return XloomError("unsupported_by_backend", message, "Set engine.backend to vllm, or remove the bundle.")
